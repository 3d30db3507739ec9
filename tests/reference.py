"""The reference's preprocessing and prompts, which the project's own are compared with."""

from build.parity.model_card import (
    SYSTEM_MESSAGE,
    reference_ids,
    reference_prompt,
    reference_tiles,
)

__all__ = ["SYSTEM_MESSAGE", "reference_ids", "reference_prompt", "reference_tiles"]
