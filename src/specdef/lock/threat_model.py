"""What a lock does not stop: the paragraph in its certificate and model card."""

from __future__ import annotations

THREAT_MODEL = (
    "This lock is meant to make ordinary fine-tuning ill-conditioned, so that it converges slowly or not at all. It is not "
    "encryption. An attacker who knows the method can undo it: {undo}. It also does not stop distillation of the outputs into a fresh model. How strong it is "
    "against which attack has to be measured; this certificate does not say."
)
UNDO = {
    "absorbed": "re-balancing each symmetric pair of tensors takes seconds and no data, and training with a learning "
    "rate per column, masking the scaled columns, K-FAC, or training a part the lock does not reach also get around it",
    "compensated": "merging each inserted layer into the matrix beside it, or freezing it, takes seconds and no data, "
    "and inserting trainable identity layers or training elsewhere in the network also gets around it",
    "deformation": "clipping the large singular values of every matrix needs no data and one decomposition each, and a short "
    "re-training on the retained task may bring back what that costs; a learning rate per layer, LoRA on modules the lock leaves "
    "alone and second-order methods may also get around it (none of this is measured here); and where the original is public, "
    "the difference to it is the key",
    "scaled": "the function is not preserved, so there is nothing left to protect; the method serves theory alone",
}


def threat_model(method: str, below: str = "") -> str:
    """Return the paragraph that says what a lock does not stop.

    Args:
        method: The lock's method.
        below: Method of the lock beneath it, where there is one.

    Returns:
        The paragraph.
    """
    undo = UNDO[method]
    if below:
        undo += f"; and the {below} lock beneath it, one after the other: {UNDO[below]}"
    return THREAT_MODEL.format(undo=undo)
