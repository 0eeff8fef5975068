"""What a recipe calls shards: one string, for a directory made by ``ufo shards`` or for tars, here or elsewhere.

=================================  ==========================================================
``data/flowers-train``             a directory made by ``ufo shards``; so is ``https://host/flowers-train``
``/data/train-{00000..00099}.tar``  tars, by brace expansion as in a shell
``a.tar::b-{0..9}.tar``            one list after another
``https://host/train-{0..9}.tar``  fetched into the shard cache
``pipe:aws s3 cp s3://b/{0..9}.tar -``  a shell command that writes the tar to its standard output; likewise
=================================  ==========================================================
"""

import os
import re
from urllib.parse import urlsplit

from braceexpand import braceexpand

from ufo_ds.errors import UserError

PIPE = "pipe:"
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")


def tars_of(spec: str) -> list[str] | None:
    """The tars that a string names, in order, or None if it names a directory.

    Raises:
        UserError: braces that do not match, a compressed tar, a scheme other than http and https.
    """
    if os.path.isdir(spec):  # whatever characters its name has
        return None
    try:
        names = [name for part in spec.split("::") for name in braceexpand(part)]
    except ValueError:
        raise UserError(f"shards {spec!r}: a brace has no partner: write a range as {{000..009}}") from None
    for name in names:
        _check(name, spec)
    return names if len(names) > 1 or _is_tar(names[0]) else None


def is_remote(name: str) -> bool:
    """Whether a tar or directory has to be fetched."""
    return is_url(name) or name.startswith(PIPE)


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def is_here(spec: str) -> bool:
    """Whether shards can be read without fetching anything."""
    tars = tars_of(spec)
    return os.path.isdir(spec) if tars is None else all(os.path.isfile(tar) for tar in tars)


def _is_tar(name: str) -> bool:
    return name.startswith(PIPE) or _path(name).endswith(".tar") or os.path.isfile(name)


def _path(name: str) -> str:
    return urlsplit(name).path if is_url(name) else name


def _check(name: str, spec: str) -> None:
    if not name:
        raise UserError(f"shards {spec!r}: a name is empty: give the path of a directory or of tars")
    if name.startswith(PIPE):
        return
    try:
        path = _path(name)
    except ValueError as error:
        raise UserError(f"shards {name}: {error}: correct it") from None
    if path.endswith(_COMPRESSED):
        raise UserError(
            f"shards {name}: images in a compressed tar cannot be read by their offset: unpack it, or let a command do "
            f"it, such as pipe:gzip -dc FILE"
        )
    if re.match(r"\w+:/", name) and not is_url(name):
        raise UserError(
            f"shards {name}: only http:// and https:// are fetched: use a command that writes the tar to its standard "
            f"output, such as pipe:aws s3 cp {name} -"
        )
