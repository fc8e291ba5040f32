"""The section a lock adds to the model card, and its removal."""

from __future__ import annotations

from pathlib import Path

from specdef.lock.certificate import LockCertificate, count_kinds

_BEGIN = "\n<!-- specdef:begin -->\n"
_END = "<!-- specdef:end -->\n"


def write_card(folder: Path, certificate: LockCertificate) -> None:
    """Append the lock's section to README.md, replacing an older one; that of the lock beneath stays.

    Args:
        folder: The model folder.
        certificate: What to summarise.
    """
    path = folder / "README.md"
    text = path.read_bytes() if path.exists() else b""
    path.write_bytes(strip_card(text, certificate) + _section(certificate).encode())


def remove_card(folder: Path, certificate: LockCertificate) -> None:
    """Take the section out again; a README.md that held nothing else goes.

    Args:
        folder: The model folder.
        certificate: Of the lock.
    """
    path = folder / "README.md"
    if path.exists():
        text = strip_card(path.read_bytes(), certificate)
        if text:
            path.write_bytes(text)
        else:
            path.unlink()


def strip_card(text: bytes, certificate: LockCertificate) -> bytes:
    """Return the text without a lock's section, byte for byte what it was before."""
    beneath = certificate.below.get("lock_id")
    start = 0
    while (begin := text.find(_BEGIN.encode(), start)) >= 0:
        end = text.find(_END.encode(), begin)
        if end < 0:
            break
        end += len(_END)
        if beneath is None or _lock_line(beneath).encode() not in text[begin:end]:
            return text[:begin] + text[end:]
        start = end
    return text


def _lock_line(lock_id: str) -> str:
    return f"Lock id `{lock_id[:16]}`."


def _section(certificate: LockCertificate) -> str:
    sites = certificate.sites
    kinds = count_kinds(sites) if isinstance(sites, list) else sites
    what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    outputs = {
        "absorbed": "equal to the original's bit for bit in float32 and bfloat16. Do not load it in float16",
        "compensated": "equal to the original's up to rounding. Load it with `specdef.load_model`",
        "scaled": "**not** those of the original",
        "deformation": "**not** those of the original: it was trained to grow its singular values and to keep its task",
    }[certificate.method]
    below = certificate.below
    whose = (
        "those of what was locked, which the section above is about," if below else "the original's"
    )
    outputs = outputs.replace("the original's", whose)
    lines = [
        f"## Locked against training{', once more' if below else ''}",
        "",
        f"The weights were locked with specdef {certificate.versions.get('specdef', '')}, "
        f"method `{certificate.method}`, at {what} sites; {certificate.tensors_changed} of {certificate.tensors_total} "
        f"tensors were changed. Its outputs are {outputs}.",
        "",
        f"| | before | after |\n|---|---|---|\n| largest singular value of the most deformed matrix | "
        f"{certificate.sigma_max_before:.4g} | {certificate.sigma_max_after:.4g} |",
        *_utility_rows(certificate),
        "",
        *_training_lines(certificate),
        *(line for note in certificate.notes for line in (f"Note: {note}", "")),
        f"**What this does not stop.** {certificate.threat_model}",
        "",
        f"Check it yourself: `specdef verify THIS_FOLDER`. {_lock_line(certificate.lock_id)}",
        "",
    ]
    return _BEGIN + "\n".join(lines) + _END


def _utility_rows(certificate: LockCertificate) -> list[str]:
    utility = certificate.utility
    if not utility:
        return []
    counted = f" ({utility['rows']} held-out rows)" if utility.get("rows") else ""
    return [
        f"| {utility['metric']}{counted} | {_number(utility['before'])} | {_number(utility['after'])} |",
        f"| held-out loss of the task | {_number(utility['retain_loss_before'])} | {_number(utility['retain_loss_after'])} |",
    ]


def _training_lines(certificate: LockCertificate) -> list[str]:
    reason = certificate.training.get("reason")
    return [f"Why the training ended: {reason}.", ""] if reason else []


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
