"""The table of contents of a tar of images; it is saved, so that a million images open in hundredths of a second."""
import contextlib
import fcntl
import hashlib
import json
import os
import tarfile
import warnings
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
from PIL import Image
from PIL.features import check as pillow_has

warnings.simplefilter("ignore", Image.DecompressionBombWarning)         # one limit everywhere: that of Pillow's error
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".npy",
            *([".avif"] if pillow_has("avif") else []),
            *([".jp2", ".jpx", ".j2k"] if pillow_has("jpg_2000") else []),
            *([".heic", ".heif"] if find_spec("pillow_heif") else []))
# How names of hidden files and folders begin; among them are thumbnails of Synology, QNAP and Windows.
HIDDEN = (".", "__MACOSX", "@eaDir", "@__thumb", "Thumbs.db", "thumbs.db", "ehthumbs", "desktop.ini", "$RECYCLE.BIN",
          "#recycle", "@Recycle", "lost+found")
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"PK": "unzip", b"\x28\xb5/\xfd": "unzstd"}
TAR_KINDS = {tarfile.DIRTYPE: "folder", tarfile.FIFOTYPE: "fifo", tarfile.CHRTYPE: "device", tarfile.BLKTYPE: "device"}


def kind_of_suffix(name):
    """What a file that is left out is called: its suffix, and which package would read it."""
    suffix = os.path.splitext(name)[1].lower() or "no suffix"
    return f"{suffix} (pip install pillow-heif reads it)" if suffix in (".heic", ".heif") else suffix


def note(text):
    """Print a line, on the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}")


def top_folders(path):
    """The set of the first folders in a tar. A file that is no plain tar ends in a sentence."""
    if not os.path.isfile(path):                                # reading a pipe would never end
        what = "a dead link" if os.path.islink(path) else "no folder and no plain file"
        raise SystemExit(f"--data {path} is {what}: a folder or a plain tar of images was expected")
    with open(path, "rb") as f:
        head = f.read(512)
    for magic, tool in COMPRESSED.items():
        if head.startswith(magic):
            raise SystemExit(f"--data {path} is compressed, so images cannot be read from its middle: unpack it once "
                             f"with {tool} and give the plain tar, or the folder")
    if head[257:262] != b"ustar" and not path.lower().endswith(".tar"):
        raise SystemExit(f"--data {path} is a file, but no tar: a folder or a plain tar of images was expected")
    return {top for top, *_ in index(path)[0]["folders"] if top}


@contextlib.contextmanager
def locked(path):
    """Hold a lock on a file or folder, where there are locks, so that only one of several processes works."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def index(path):
    """The table of contents of a tar -> facts (a dict), sorted array of (name, start, size). It is made once, then read
    from a file beside the tar (in the user's cache where that cannot be written) while size and date are the same."""
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "small-vit-ssl")
    digest = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    places = path + ".index", os.path.join(cache, digest + ".index")
    with locked(path):
        stat = os.stat(path)
        now = dict(format=3, bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, suffixes=" ".join(SUFFIXES))
        found = next(filter(None, (read_index(place, now) for place in places)), None)
        if found:
            return found
        facts, table = contents(path)
        head = json.dumps(dict(now, count=len(table), dtype=table.dtype.descr, **facts))
        for place in places:
            part = f"{place}.{os.getpid()}.tmp"
            try:
                os.makedirs(os.path.dirname(os.path.abspath(place)), exist_ok=True)
                with open(part, "wb") as f:                     # beside its place, then renamed
                    f.write(head.encode() + b"\n" + table.tobytes())
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(part, place)
                return read_index(place, now) or (facts, table)
            except OSError as error:
                problem = error
                if os.path.exists(part):                        # half of it, where the disk is full
                    os.remove(part)
    print(f"warning: the index of {path} cannot be saved ({problem}): it will be made again at every start")
    return facts, table


def read_index(place, now):
    """Open an index file, if it is whole and has the facts `now` -> facts, table (mapped, not read), else None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(place, "rb") as f:
        facts = json.loads(f.readline())
        dtype = np.dtype([(name, kind) for name, kind in facts["dtype"]])
        whole = os.fstat(f.fileno()).st_size == f.tell() + facts["count"] * dtype.itemsize
        if whole and facts["count"] and all(facts[key] == value for key, value in now.items()):
            return facts, np.memmap(f, dtype, "r", f.tell(), facts["count"])


def contents(path):
    """Go through a tar, and the tars in it -> facts, table in the order of a walk through folders."""
    found = SimpleNamespace(entries={}, links={}, folders=set(), skipped=Counter(), nested=0)
    with open(path, "rb") as f:
        scan(f, path, found)
    entries, folders, skipped = found.entries, found.folders, found.skipped
    for name, target in found.links.items():
        if target in entries:
            entries[name] = entries[target]
        else:
            skipped["dead links"] += 1
    root = next(iter(entries), "").split("/")[0] + "/"          # a single folder around train/ is taken away
    train = root.lower() + "train/"
    if all(name.startswith(root) for name in entries) and any(name.lower().startswith(train) for name in entries):
        entries = {name.removeprefix(root): place for name, place in entries.items()}
        folders = {name.removeprefix(root) for name in folders}
    names = sorted(entries, key=lambda name: name.split("/"))   # part by part: "a/x" comes before "a-b/x"
    counts = Counter()                                          # how many images the first two levels of folders hold
    for name in [*folders, *names]:
        counts[(*name.split("/")[:-1], "", "")[:2]] += name in entries
    rows = [(os.fsencode(name), *entries[name]) for name in names]
    longest = max((len(name) for name, *_ in rows), default=1)
    table = np.array(rows, [("name", f"S{longest}"), ("start", "<i8"), ("size", "<i8")])
    return dict(folders=[[*key, count] for key, count in counts.items()], nested=found.nested, skipped=skipped), table


def scan(f, path, found, outer="", base=0):
    """Add what is in an open tar to `found`: entries (name -> start, size), links (name -> target), folders, others by
    their suffix. A tar inside is taken for a folder, `outer`. A tar that is not whole ends in a sentence."""
    what = f"{outer}.tar in {path}" if outer else path
    try:
        archive = tarfile.open(fileobj=f, mode="r:", errorlevel=2)
        for m in iter(archive.next, None):
            archive.members = []                                # it would keep a million of them
            name = os.path.normpath(os.path.join(outer, m.name.lstrip("/")))
            if any(part.startswith(HIDDEN) for part in name.split("/")):
                continue
            is_image = name.lower().endswith(SUFFIXES)
            if not (m.isdir() and is_image):
                found.folders.add(os.path.join(name if m.isdir() else os.path.dirname(name), ""))
            if name.lower().endswith(".tar") and m.isreg() and not outer:
                found.nested += 1
                found.folders.add(name[:-4] + "/")
                scan(archive.extractfile(m), path, found, name[:-4], m.offset_data)
            elif is_image and (m.issym() or m.islnk()):
                target = os.path.join(os.path.dirname(m.name), m.linkname) if m.issym() else m.linkname
                found.links[name] = os.path.normpath(os.path.join(outer, target.lstrip("/")))
            elif is_image and m.isreg() and not m.issparse():
                found.entries[name] = base + m.offset_data, m.size      # of two of one name the later, as in unpacking
                if len(found.entries) % 100_000 == 0:
                    print(f"reading the headers of {path}: {len(found.entries):,} images so far")
            elif is_image or not m.isdir():
                found.skipped[TAR_KINDS.get(m.type) or kind_of_suffix(name)] += 1
    except tarfile.TarError as error:
        raise SystemExit(f"{what} is damaged or cut short ({error}): get it again") from None
    # tarfile takes a damaged header for the end. But a whole archive ends in zeros, and nothing else follows them.
    f.seek(archive.offset)
    end, place = f.read(512), f"at byte {base + archive.offset:,}"
    if len(end) < 512 or end.strip(b"\0"):
        problem = "has a damaged header" if end else "ends without an end mark: it was cut short"
        raise SystemExit(f"{what} {problem}, {place}: get it again")
    if f.read(2 ** 20).strip(b"\0"):
        raise SystemExit(f"{what} goes on after its end mark, {place}, perhaps with another tar: make one tar of them")
