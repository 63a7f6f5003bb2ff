"""The logit loss: the student's next-token distribution against the teacher's cached likeliest tokens.

Knowledge distillation, Hinton et al. 2015, arXiv 1503.02531, from a cache: of each of the teacher's distributions the
`k` likeliest tokens are there with their probabilities, and all others together as one more outcome, the tail. Without
the tail the `k` would have to sum to one, which teaches a student to be surer than its teacher (arXiv 2503.16870).
Axes: `n` tokens, `k` cached ones, `v` the student's vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .data import IGNORED


def taught(labels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`[b, t - 1]` bool: tokens whose next one is predicted, and that the teacher has a distribution for.

    Args:
        labels: `[b, t]`, `IGNORED` where a token is not predicted, as the first of a sample never is.
        ids: `logit_ids` `[b, t, k]`.
    """
    return (labels[:, 1:] != IGNORED) & (ids[:, :-1, 0] >= 0)


def logit_loss(
    student: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    tail: torch.Tensor,
    *,
    temperature: float = 1.0,
) -> torch.Tensor:
    """`T² KL(teacher || student)` per token `[n]`, in nats, over the cached tokens and the tail.

    At most the divergence over the whole vocabulary, and that where all of it is cached. With a temperature `T` both
    sides' `k + 1` probabilities are raised to `1 / T` and normalised: the tail is flattened as if it were one token,
    because of what lies in it only the sum is known. `T²` keeps the gradient's size. Tokens that the student's head
    does not have, as where the teacher's is padded to more, count to the tail, if there is one.

    Args:
        student: `[n, v]` logits, with gradient.
        ids: `[n, k]` int, no token twice.
        logprobs: `[n, k]` of the teacher, over its whole vocabulary.
        tail: `[n]`: the log-probability of all tokens that are not in `ids`; minus infinity if there are none.
        temperature: `T`.
    """
    student, logprobs, tail = student.float(), logprobs.float(), tail.float()
    size = student.shape[-1]
    ids, foreign = ids.long(), ids >= size
    if foreign.any():
        tail = torch.cat([tail[:, None], logprobs.masked_fill(~foreign, -torch.inf)], dim=1).logsumexp(1)
        logprobs, ids = logprobs.masked_fill(foreign, -torch.inf), ids.masked_fill(foreign, size)
    named = torch.zeros(len(ids), size + 1, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)[:, :size]
    # Of logits and not of one minus the others, whose rounding would be all there is where the student is sure.
    whole = named.all(1, keepdim=True)
    rest = student.masked_fill(named & ~whole, -torch.inf).logsumexp(1, keepdim=True)
    likeliest = student.gather(1, ids.clamp(max=size - 1)).masked_fill(foreign, -torch.inf)
    own = torch.cat([likeliest, rest.masked_fill(whole, -torch.inf)], dim=1)
    wanted = torch.cat([logprobs, tail[:, None]], dim=1)
    # The student's first step is a softmax over its whole vocabulary; its outcomes sum to one as the teacher's do.
    own = own - student.logsumexp(1, keepdim=True)
    if temperature != 1:
        own, wanted = (F.log_softmax(side / temperature, dim=1) for side in (own, wanted))
    impossible = (wanted == -torch.inf) | (own == -torch.inf)
    error: torch.Tensor = (wanted.exp() * (wanted - own).masked_fill(impossible, 0)).sum(1)
    return temperature**2 * error
