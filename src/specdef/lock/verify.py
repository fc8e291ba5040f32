"""Verify a locked model: certificate, hashes, and the difference of its outputs to the original's, per dtype."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdef.curvature.losses import Batch, Loss
from specdef.errors import CertificateMismatch, CheckpointError, KeyMismatch
from specdef.lock.certificate import LockCertificate, load_certificate, table_digest
from specdef.lock.deformation.check import check_utility
from specdef.lock.deformation.retain import RetainFunction, UtilityFunction
from specdef.lock.files import changed_files
from specdef.lock.key import Key, load_key, require_match
from specdef.lock.load import load_model
from specdef.lock.stack import certificate_below
from specdef.lock.unlock import changed_tensors, inverse_edits
from specdef.weights.checkpoint import Checkpoint
from specdef.weights.edit import OutOfRange
from specdef.weights.rewrite import Progress, TensorHashes, rewrite_tensors

DTYPES = ("float32", "bfloat16")
"""Dtypes in which an absorbed lock promises bit identity."""

PROBE_SHAPE = (2, 48)
"""Sequences and tokens per sequence that outputs are compared on; every position of every sequence counts."""

_CHANGED = "tensor {} was changed since the model was locked"

_SLACK = 2.0
"""Factor by which a difference may exceed the recorded one: other machines sum in another order. 0 stays 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDifference:
    """Outputs of locked and original model on the same inputs.

    Args:
        dtype: Dtype both were loaded in.
        bit_identical: Every output is equal.
        max_abs_logit_difference: Largest absolute difference.
        max_abs_logit: Largest absolute output of the original, for scale.
    """

    dtype: str
    bit_identical: bool
    max_abs_logit_difference: float
    max_abs_logit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Result of `verify_checkpoint`.

    Args:
        valid: Everything that was checked holds.
        bit_identical: Outputs equal in every dtype checked; None where no original was given.
        max_abs_logit_difference: Largest over the dtypes; None likewise.
        dtype: The dtype with the largest difference; None likewise.
        tensors_checked: Tensors whose hash was computed.
        method: The lock method.
        claims_bit_identity: What the certificate promises.
        source_matches: The original given is the one that was locked, of two locks by either; None where none was given.
        key_matches: The key unlocks this model to the recorded original; None where none was given.
        outputs: Per dtype.
        utility: What the batches given say: metric, value, loss, rows, `recorded` value, `same_data` as at lock time; None
            where none were given.
        problems: What does not hold, one sentence each.
        notes: What could not be compared.
        below: Method of the lock beneath the one on top; empty where there is none.
        original_of: Method of the lock whose original was given; None where none was, or it is neither's.
    """

    valid: bool
    bit_identical: bool | None
    max_abs_logit_difference: float | None
    dtype: str | None
    tensors_checked: int
    method: str
    claims_bit_identity: bool
    source_matches: bool | None = None
    key_matches: bool | None = None
    outputs: tuple[OutputDifference, ...] = ()
    utility: dict[str, Any] | None = None
    problems: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = ()
    below: str = ""
    original_of: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def verify_checkpoint(
    locked: str | Path,
    original: str | Path | None = None,
    key: str | Path | Key | None = None,
    *,
    dtypes: Sequence[str] = DTYPES,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    status: Callable[[str], None] | None = None,
    heldout: Iterable[Batch] | None = None,
    loss: Loss | RetainFunction | None = None,
    utility: UtilityFunction | None = None,
    load: Callable[[Path], nn.Module] | None = None,
) -> Verification:
    """Check a locked folder against its certificate, and against its original and key where they are given.

    Args:
        locked: Folder that `lock_checkpoint` wrote. Anyone can check it so far.
        original: The unlocked model: its hashes and its outputs are compared. Of two locks, what either was put on: the
            outputs are then to be what that lock, and all above it, promise.
        key: The key, or its path: its inverse is computed (nothing is written) and hashed.
        dtypes: Dtypes outputs are compared in.
        seed: Seeds the random inputs.
        device: Where the models run.
        progress: Called with (bytes done, bytes in all).
        status: Told what is being worked on.
        heldout: Batches to measure utility on; where they are those of a deformation, it is compared with the recorded one.
        loss: The task loss of lock time, where one was given.
        utility: The measure of lock time, where one was given.
        load: How the folder becomes the model that is measured; None is `load_model` in float32.

    Returns:
        What holds and what does not.

    Raises:
        CheckpointError: A folder, the certificate or the key cannot be read at all.
    """
    checkpoint = Checkpoint.open(locked)
    try:
        certificate = load_certificate(checkpoint.folder)
    except CertificateMismatch as error:
        return Verification(
            valid=False, bit_identical=None, max_abs_logit_difference=None, dtype=None, tensors_checked=0,
            method="", claims_bit_identity=False, problems=(str(error),),
        )  # fmt: skip
    problems: list[str] = []
    if status:
        status("hashing tensors")
    key_matches = None
    edits = {}
    if key is not None:
        key = key if isinstance(key, Key) else load_key(key)
        try:
            require_match(key, certificate.to_dict())
            edits = inverse_edits(key, certificate)
            key_matches = True
        except KeyMismatch as error:
            key_matches = False
            problems.append(str(error))
    try:
        hashes = rewrite_tensors(checkpoint, None, edits, progress=progress)
        problems += _tensor_problems(hashes, certificate, unlocked=bool(key_matches))
    except (OutOfRange, CheckpointError):
        # values that cannot be undone, NaN among them: a finding where the tensors were changed
        changed = changed_tensors(checkpoint, certificate, checkpoint.names)
        if not changed:
            raise
        problems += [_CHANGED.format(name) for name in changed]
    if key_matches and problems:
        key_matches = False
    problems += changed_files(checkpoint.folder, certificate)
    below = None
    try:
        below = certificate_below(checkpoint.folder, certificate)
    except (CertificateMismatch, CheckpointError) as error:
        problems.append(str(error))
    outputs: list[OutputDifference] = []
    notes: list[str] = []
    source_matches, origin = None, None
    if original is not None:
        origin = _origin(Checkpoint.open(original), [certificate, *([below] if below else [])])
        source_matches = origin is not None
        if below and origin is below:
            notes.append(
                f"this original is that of the {below.method} lock, beneath the {certificate.method} one: what the outputs "
                f"may differ by is up to {below.method}; give what the lock on top was put on to check that one alone"
            )
        if not source_matches:
            problems.append(
                f"{original} is not the model that was locked (its tensors hash differently)"
            )
        for dtype in dtypes:
            if status:
                status(f"comparing outputs in {dtype}")
            outputs.append(
                compare_outputs(checkpoint.folder, Path(original), dtype, seed=seed, device=device)
            )
        promise = origin or certificate
        for item in outputs:
            recorded = promise.output_difference.get(item.dtype)
            if recorded is not None and not item.max_abs_logit_difference <= _SLACK * recorded:
                problems.append(
                    f"outputs in {item.dtype} differ by up to {item.max_abs_logit_difference:.3g}, "
                    f"the certificate records {recorded:.3g}"
                )
            elif promise.bit_identical and not item.bit_identical and item.dtype != "float16":
                problems.append(
                    f"outputs in {item.dtype} differ by up to {item.max_abs_logit_difference:.3g}, bit identity was claimed"
                )
    measured: dict[str, Any] | None = None
    if heldout is not None:
        if status:
            status("measuring utility")
        measured, wrong, uncompared = check_utility(
            checkpoint.folder, certificate.utility, heldout, loss=loss, utility=utility, load=load, device=device
        )  # fmt: skip
        problems += wrong
        notes += uncompared
    # a difference that is not a number is the worst of all
    worst = max(
        outputs,
        key=lambda o: (
            o.max_abs_logit_difference != o.max_abs_logit_difference,
            o.max_abs_logit_difference,
        ),
        default=None,
    )
    return Verification(
        valid=not problems,
        bit_identical=all(o.bit_identical for o in outputs) if outputs else None,
        max_abs_logit_difference=worst.max_abs_logit_difference if worst else None,
        dtype=worst.dtype if worst else None,
        tensors_checked=len(checkpoint.names),
        method=certificate.method,
        claims_bit_identity=certificate.bit_identical,
        source_matches=source_matches,
        key_matches=key_matches,
        outputs=tuple(outputs),
        utility=measured,
        problems=tuple(problems),
        notes=tuple(notes),
        below=certificate.below.get("method", ""),
        original_of=origin.method if origin else None,
    )


def compare_outputs(
    locked: Path, original: Path, dtype: str, *, seed: int = 0, device: str = "cpu"
) -> OutputDifference:
    """Run both models on the same random inputs.

    Args:
        locked: Locked folder.
        original: Original folder.
        dtype: Dtype both are loaded in.
        seed: Seeds the inputs.
        device: Where the models run.

    Returns:
        The difference of their outputs, inf where they have different shapes.
    """
    results = []
    for folder in (original, locked):
        model = load_model(folder, dtype=dtype, device=device)
        with torch.no_grad():
            inputs = {n: x.to(device) for n, x in probe_inputs(model, seed=seed).items()}
            results.append(_outputs(model(**inputs)).cpu())
        del model
        gc.collect()
    first, second = results
    if first.shape != second.shape:
        return OutputDifference(
            dtype=dtype,
            bit_identical=False,
            max_abs_logit_difference=math.inf,
            max_abs_logit=float(first.double().abs().max()),
        )
    difference = (first.double() - second.double()).abs().max()
    return OutputDifference(
        dtype=dtype,
        bit_identical=bool(torch.equal(first, second)),
        max_abs_logit_difference=float(difference),
        max_abs_logit=float(first.double().abs().max()),
    )


def probe_inputs(model: nn.Module, *, seed: int = 0) -> dict[str, Tensor]:
    """Draw inputs a transformers model takes: token ids, or pixel values.

    Args:
        model: The model.
        seed: Seeds the draw.

    Returns:
        Keyword arguments of its forward.

    Raises:
        CheckpointError: The model takes neither.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    dtype = next(model.parameters()).dtype
    if model.main_input_name == "input_ids":
        text = config.get_text_config()
        length = min(
            PROBE_SHAPE[1], getattr(text, "max_position_embeddings", None) or PROBE_SHAPE[1]
        )
        ids = torch.randint(0, text.vocab_size, (PROBE_SHAPE[0], length), generator=generator)
        pad = getattr(text, "pad_token_id", None)
        if pad is not None:  # some heads look for padding, and random ids would place it mid-text
            ids = torch.where(ids == pad, (pad + 1) % text.vocab_size, ids)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 64)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (PROBE_SHAPE[0], getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.randn(shape, generator=generator).to(dtype)}
    raise CheckpointError(
        f"inputs of {type(model).__name__} ({model.main_input_name}) are not known here"
    )


def _outputs(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]  # type: ignore[no-any-return]


def _tensor_problems(
    hashes: dict[str, TensorHashes], certificate: LockCertificate, *, unlocked: bool
) -> list[str]:
    out = []
    for name in {**certificate.tensors, **hashes}:
        expected, found = certificate.tensors.get(name), hashes.get(name)
        if found is None:
            out.append(f"tensor {name} is missing")
        elif expected is None:
            out.append(f"tensor {name} was not there when the model was locked")
        elif found.before != expected["sha256"]:
            out.append(_CHANGED.format(name))
        elif unlocked and found.after != expected["sha256_original"]:
            out.append(f"tensor {name} does not unlock to the original with this key")
    return out


def _origin(
    original: Checkpoint, certificates: Iterable[LockCertificate]
) -> LockCertificate | None:
    """Return the certificate of the lock that this model was locked by, if it is one of these."""
    hashes = rewrite_tensors(original, None, {})
    found = table_digest({n: h.before for n, h in hashes.items()})
    for certificate in certificates:
        rows = certificate.tensors.items()
        if found == table_digest({n: row["sha256_original"] for n, row in rows}):
            return certificate
    return None
