"""A teacher under vLLM.

`teacher` starts the engine and feeds it, `connector` and `worker` are what runs inside it, `layout` finds out how its
cache is laid out, `copier` reads rows from there, `handover` brings them over, `assembly` puts samples together.
Only `settings` can be imported where vLLM is not installed.
"""
