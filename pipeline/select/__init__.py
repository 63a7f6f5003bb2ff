"""Slots: which tokens are kept, and the stage that fills them."""
