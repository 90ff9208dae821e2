"""Bringing a data set to the attempt's own disk, once, whole and verified.

A folder is used where it lies. The objects under s3://bucket/prefix, and packs (`job.storage.pack`)
anywhere, are mirrored into a cache (`job.storage.cache`): only what is new or has changed is
fetched, archives are unpacked, and nobody ever sees half of a set.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from xml.etree import ElementTree

from job.errors import DataError, StorageError
from job.storage import open_store
from job.storage.archives import is_archive, unpack
from job.storage.cache import ArchiveEntry, DataCache, DataSet, FileEntry, SetContent
from job.storage.digests import file_digest, file_has, md5_promise
from job.storage.get import (
    Credentials,
    FolderAddress,
    ObjectChanged,
    S3Address,
    find_route,
    folder_etag,
)
from job.storage.held import DECODED, remove_leftovers
from job.storage.large import boot_id
from job.storage.packindex import INDEX, PackIndex, is_shard
from job.storage.progress import Silent, TransferProgress, megabytes
from job.storage.transfer import Origin, spans, transfer
from job.storage.units import Arrived, Member, Span, Whole, begun, read_all, until_good

if TYPE_CHECKING:
    from job.storage.s3 import S3Store  # boto3 takes a while to import

SCRATCH_VARIABLE = "S4GAN_SCRATCH"
LISTINGS = 4
"""How often the objects are listed again because one changed while it was fetched."""
SPARE = 0.05
"""Share of the needed space that must be free beyond it."""
NAME_BYTES = 255
"""Longest name of a file on the usual file systems."""


@contextlib.contextmanager
def data_folder(
    uri: str,
    *,
    progress: TransferProgress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Path]:
    """A local folder with the data of `uri`; stays as it is until the block ends.

    Args:
        uri: a folder, used where it lies; or s3://BUCKET/PREFIX, or a pack anywhere.
        progress: told how far it is.
        stopped: asked several times a second.

    Raises:
        ConfigError: the URI, the bucket or the credentials are wrong.
        DataError: there is nothing, or something that cannot be a data set.
        StorageError: something cannot be fetched, or the disk is full.
        Preempted: stopped; what has been fetched stays for the next attempt.
    """
    source = _source(uri)
    if isinstance(source, Path):
        yield source
        return
    bringer = _Bringer(source, progress or Silent(), stopped)
    data, held = bringer.bring()
    folder = bringer.cache.path_of(data)
    del data  # of a million files half a gigabyte, and training takes days
    try:
        yield folder
    except DataError as error:  # what is to be mended is the original
        copy, original = f"{folder}/", f"{uri.rstrip('/')}/"
        raise DataError(
            error.message.replace(copy, original), mend=error.mend.replace(copy, original)
        ) from error
    finally:
        os.close(held)


def cache_root() -> Path:
    """Where copies of data sets are kept."""
    return scratch_root() / "data"


def scratch_root() -> Path:
    """The local disk to work on: S4GAN_SCRATCH, else /scratch, else the user's cache folder."""
    chosen = os.environ.get(SCRATCH_VARIABLE)
    if chosen:
        base = Path(chosen)
    elif os.access("/scratch", os.W_OK):
        base = Path("/scratch")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return base.absolute() / "s4gan"


# ---------------------------------------------------------------- sources


@dataclass(frozen=True, slots=True)
class Listed:
    """An object below the data URI. There may be a million: hence the slots."""

    path: str
    """Below it."""
    key: str
    """For the getter."""
    size: int
    etag: str


class _Source(Protocol):
    """Where a data set is copied from."""

    uri: str
    origin: Origin

    @property
    def place(self) -> str:
        """The URI and all that decides what it means here."""

    def listing(self) -> list[Listed]:
        """All objects, sorted by path."""


def _source(uri: str) -> _Source | Path:
    """What to copy from, or a folder that is used where it lies."""
    store = open_store(uri)
    folder = store.local_path("")
    if folder is None:
        return S3Source(cast("S3Store", store))
    return _PackFolder(uri, folder) if (folder / INDEX).is_file() else folder


class S3Source:
    """Objects under s3://bucket/prefix.

    Raises:
        ConfigError: no usable credentials.
    """

    def __init__(self, store: S3Store) -> None:
        from botocore.exceptions import BotoCoreError
        from botocore.session import Session

        from job.storage.s3 import explain

        self.uri = store.uri
        self.bucket, self.prefix = store.bucket, store.prefix
        self.client = store.client
        self.client.meta.events.register("before-parse.s3.ListObjectsV2", _read_contents)
        try:
            route = find_route(self.client, self.bucket)
            resolved = Session().get_credentials()
        except BotoCoreError as error:
            raise explain(error, "read", self.uri) from error

        def credentials() -> Credentials | None:
            if resolved is None:
                return None
            now = resolved.get_frozen_credentials()  # fresh ones if they were about to expire
            return Credentials(now.access_key, now.secret_key, now.token)

        self.origin = Origin(S3Address(self.bucket, route), credentials)

    @property
    def place(self) -> str:
        """See `_Source.place`."""
        return f"{self.client.meta.endpoint_url} {self.uri}"

    def listing(self) -> list[Listed]:
        """See `_Source.listing`.

        A prefix that is itself the name of an archive is a listing of that one.
        """
        root = f"{self.prefix}/" if self.prefix else ""
        found = self._list(root)
        if not found and is_archive(self.prefix):
            folder = self.prefix.rpartition("/")[0]
            found = [
                item
                for item in self._list(self.prefix, below=f"{folder}/" if folder else "")
                if item.key == self.prefix
            ]
        return found

    def _list(self, prefix: str, below: str | None = None) -> list[Listed]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        from job.storage.s3 import explain

        cut = len(prefix if below is None else below)
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=prefix
        )
        try:
            return [
                Listed(item["Key"][cut:], item["Key"], item["Size"], item["ETag"])
                for page in pages
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")  # the marker of a folder
            ]
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise explain(error, "list", self.uri) from error


def _read_contents(
    response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any
) -> None:
    """Take the objects out of a page of a list before botocore parses it, which is slow at that.

    By then botocore has seen that the page is good XML. It adds `customized_response_dict` to
    what it finds in the rest of the page, and then undoes the encoding of keys. A page that is
    written in another way than by S3 stays as it is.
    """
    body = response_dict["body"]
    if response_dict["status_code"] != 200:
        return
    found = []
    for item in _CONTENTS.findall(body):
        key, size, etag = (fact.search(item) for fact in (_KEY, _SIZE, _ETAG))
        if key is None or size is None or etag is None:
            return
        found.append({"Key": _text(key[1]), "Size": int(size[1]), "ETag": _text(etag[1])})
    if found:
        customized_response_dict["Contents"] = found
        response_dict["body"] = _CONTENTS.sub(b"", body)


_CONTENTS = re.compile(rb"<Contents>(.*?)</Contents>", re.DOTALL)
_KEY = re.compile(rb"<Key>([^<]+)</Key>")
_SIZE = re.compile(rb"<Size>(\d+)</Size>")
_ETAG = re.compile(rb"<ETag>([^<]+)</ETag>")


def _text(escaped: bytes) -> str:
    """Of XML."""
    text = escaped.replace(b"&quot;", b'"').replace(b"&#34;", b'"')
    if b"&" in text or b"\r" in text:  # seldom: keys come in URL encoding
        return ElementTree.fromstring(b"<text>%s</text>" % escaped).text or ""
    return text.decode()


class _PackFolder:
    """A pack in a local folder."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri = uri
        self._folder = folder.resolve()
        self.origin = Origin(FolderAddress(str(self._folder)), lambda: None)

    @property
    def place(self) -> str:
        """See `_Source.place`."""
        return str(self._folder)

    def listing(self) -> list[Listed]:
        """See `_Source.listing`."""
        found = []
        for path in sorted(self._folder.iterdir()):
            if path.name == INDEX or is_shard(path.name):
                status = path.stat()
                found.append(Listed(path.name, path.name, status.st_size, folder_etag(status)))
        return found


# ---------------------------------------------------------------- bringing


@dataclass
class _Plan:
    """What a set is to consist of, by path; and where it would have to be fetched from."""

    tags: dict[str, str] = field(default_factory=dict)
    wholes: dict[str, Whole] = field(default_factory=dict)
    members: dict[str, tuple[Listed, Member]] = field(default_factory=dict)
    """Files of a pack, and the shards they are in."""
    archives: list[Listed] = field(default_factory=list)

    def file(self, path: str) -> Whole | Member:
        """Where a file comes from."""
        return self.wholes[path] if path in self.wholes else self.members[path][1]

    def units(self, paths: Sequence[str]) -> list[Whole | Span]:
        """What to fetch for these files."""
        units: list[Whole | Span] = [self.wholes[path] for path in paths if path in self.wholes]
        by_shard: dict[str, list[Member]] = {}
        shards: dict[str, Listed] = {}
        for path in paths:
            if path in self.members:
                shard, member = self.members[path]
                shards[shard.key] = shard
                by_shard.setdefault(shard.key, []).append(member)
        for key, members in by_shard.items():
            members.sort(key=lambda member: member.offset)
            units += spans(key, shards[key].etag, members)
        return units


class _Bringer:
    """One bringing of one source into its cache."""

    def __init__(
        self, source: _Source, progress: TransferProgress, stopped: Callable[[], bool]
    ) -> None:
        self._source = source
        self._progress = progress
        self._stopped = stopped
        digest = hashlib.sha256(source.place.encode()).hexdigest()[:12]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.uri.partition("://")[2] or source.uri)
        self.cache = DataCache(cache_root() / f"{name.strip('-')[-40:]}-{digest}")

    def bring(self) -> tuple[DataSet, int]:
        """The set of what is there now, and a descriptor that holds it until it is closed."""
        with self.cache.locked(stopped=self._stopped, waiting=self._say_waiting) as lock:
            for attempt in range(1, LISTINGS + 1):
                listing = self._source.listing()
                if not listing:
                    raise DataError(
                        f"{self._source.uri}: holds no objects",
                        mend="check the address; README.md, Your own images, says what it holds",
                    )
                fingerprint = _fingerprint(listing)
                try:
                    data = self._complete_set(fingerprint) or self._gather(
                        listing, fingerprint, lock
                    )
                    break
                except ObjectChanged as changed:
                    if attempt == LISTINGS:
                        raise StorageError(
                            f"{self._source.uri}: {changed} and others change all the time while "
                            "they are fetched",
                            mend="wait until whoever writes there is ready, then run it again",
                        ) from None
                    self._progress.say(f"data: {changed} has just changed; listing again")
            held = self.cache.hold(data)
            self.cache.delete_others(data)
        return data, held

    def _say_waiting(self) -> None:
        self._progress.say(
            f"data: waiting for another process that brings {self._source.uri} to this disk"
        )

    def _complete_set(self, fingerprint: str) -> DataSet | None:
        for data in self.cache.sets():
            if data.fingerprint == fingerprint:
                files = data.content.files
                if len(self.cache.intact_files(data)) == len(files):
                    self.cache.confirm(data)
                    size = sum(entry.size for entry in files.values())
                    self._progress.say(
                        f"data: {len(files)} files, {megabytes(size)}, unchanged since they were "
                        f"brought to {self.cache.path_of(data)}"
                    )
                    return data
        return None

    def _gather(self, listing: list[Listed], fingerprint: str, lock: int) -> DataSet:
        """Make a set of what is listed; the list is empty after that."""
        began_s = time.monotonic()
        plan = self._plan(listing)
        listing.clear()  # all is in the plan; of a million objects that is a hundred megabytes
        content, missing = self._take_over(plan)
        taken = len(content.files)
        units = plan.units(missing)
        archives = [a for a in plan.archives if a.path not in content.archives]
        size = sum(plan.file(path).size for path in missing) + sum(a.size for a in archives)
        self._check_space(size, missing, len(archives))
        self._progress.begin("data", len(missing) + len(archives), size)
        try:
            self._fetch(units, plan, content, lock)
            for archive in archives:
                self._bring_archive(archive, plan, content, lock)
        finally:
            self._progress.end()
        data = self.cache.complete(fingerprint, content)
        shutil.rmtree(self.cache.archives, ignore_errors=True)
        seconds = time.monotonic() - began_s
        self._progress.say(
            f"data: {len(content.files)} files in {self.cache.path_of(data)}; "
            f"{len(missing) + len(archives)} fetched, {taken} were there; {megabytes(size)} in "
            f"{seconds:.1f} s, {size / 1e6 / max(seconds, 1e-3):.1f} MB/s"
        )
        return data

    def _plan(self, listing: Sequence[Listed]) -> _Plan:
        plan = _Plan()
        index = next((item for item in listing if item.path == INDEX), None)
        if index is not None:
            self._plan_pack(plan, index, listing)
        else:
            for item in listing:
                check_path(item.path, f"{self._source.uri}/{item.path}")
                if is_archive(item.path):
                    plan.archives.append(item)
                else:
                    plan.tags[item.path] = item.etag
                    plan.wholes[item.path] = Whole(item.key, item.size, item.etag, item.path)
        check_collisions(plan.tags, self._source.uri)
        return plan

    def _plan_pack(self, plan: _Plan, listed: Listed, listing: Sequence[Listed]) -> None:
        getter = self._source.origin.address.getter(self._source.origin.credentials)

        def read() -> bytearray:
            with getter.open(listed.key, etag=listed.etag) as reply:
                return read_all(reply, listed.size)

        try:
            text = until_good(read, listed.key)
        finally:
            getter.close()
        index = PackIndex.from_json(bytes(text), called=f"{self._source.uri}/{INDEX}")
        shards = {item.path: item for item in listing}
        strangers = [p for p in shards if p != INDEX and not is_shard(p)]
        if strangers:
            self._progress.say(
                f"warning: {self._source.uri}/{strangers[0]} lies beside a pack and is left out; "
                f"{len(strangers)} such objects"
            )
        for shard in index.shards:
            found = shards.get(shard.name)
            if found is None or found.size != shard.size:
                raise DataError(
                    f"{self._source.uri}/{shard.name}: is missing, or not of this pack",
                    mend="make the pack again: s4gan data pack",
                )
        for file in index.files:
            check_path(file.path, f"{self._source.uri}: {file.path}")
            member = Member(file.path, file.size, file.offset, f"sha256:{file.sha256}")
            plan.tags[file.path] = member.check
            plan.members[file.path] = (shards[file.shard], member)

    def _take_over(self, plan: _Plan) -> tuple[SetContent, list[str]]:
        """Files that need not be fetched: gathered before, or in an older set. And the others."""
        resumed = self.cache.resume()
        kept = SetContent()
        is_begun = self.cache.incoming.is_dir()  # else a million files would be looked for
        for archive in plan.archives:
            self._keep_archive(archive, plan, resumed, kept)
        for path, tag in plan.tags.items():
            entry = resumed.files.get(path)
            if entry is None or entry.tag != tag:
                entry = self._salvaged(path, plan) if is_begun else None
            if entry is not None:
                kept.files[path] = entry
        missing = [path for path in plan.tags if path not in kept.files]
        self.cache.begin(kept, expected=missing)
        for old in self.cache.sets()[:1]:
            intact = self.cache.intact_files(old)
            for path in missing:
                entry = intact.get(path)
                if entry is not None and entry.tag == plan.tags[path]:
                    kept.files[path] = self.cache.link(old, entry)
            self._link_archives(old, intact, plan, kept)
        self.cache.record(kept.files[path] for path in missing if path in kept.files)
        return kept, [path for path in missing if path not in kept.files]

    def _salvaged(self, path: str, plan: _Plan) -> FileEntry | None:
        """A file that a killed process, or a full disk, left without a note that it is complete."""
        file = self.cache.incoming / path
        try:
            status = file.lstat()
            if status.st_size != plan.file(path).size:
                return None
            if path in plan.members:
                check = plan.members[path][1].check
                right = file_has(file, check)
            else:
                promise = md5_promise(plan.wholes[path].etag)
                right = promise is not None and promise.is_of(file)
                check = f"crc32:{file_digest(file, 'crc32').hex()}"
        except OSError:
            return None
        if not right:
            return None
        return FileEntry(path, status.st_size, status.st_mtime_ns, plan.tags[path], check)

    def _keep_archive(
        self, archive: Listed, plan: _Plan, resumed: SetContent, kept: SetContent
    ) -> None:
        entry = resumed.archives.get(archive.path)
        if entry is None or entry.tag != archive.etag:
            return
        if all(path in resumed.files for path in entry.paths):
            check_collisions(
                [*(plan.tags.keys() | kept.files.keys()), *entry.paths], self._source.uri
            )
            kept.archives[archive.path] = entry
            kept.files |= {path: resumed.files[path] for path in entry.paths}

    def _link_archives(
        self, old: DataSet, intact: Mapping[str, FileEntry], plan: _Plan, kept: SetContent
    ) -> None:
        for archive in plan.archives:
            entry = old.content.archives.get(archive.path)
            if entry is None or entry.tag != archive.etag or archive.path in kept.archives:
                continue
            if all(path in intact for path in entry.paths):
                check_collisions(
                    [*(plan.tags.keys() | kept.files.keys()), *entry.paths], self._source.uri
                )
                linked = [self.cache.link(old, intact[path]) for path in entry.paths]
                kept.archives[archive.path] = entry
                kept.files |= {file.path: file for file in linked}
                self.cache.record(linked)
                self.cache.record_archive(entry)

    def _check_space(self, size: int, missing: Sequence[str], archives: int) -> None:
        """Raises StorageError if the disk cannot take so many bytes, or so many files."""
        folder, files = self.cache.folder, len(missing) + archives
        needed, free = int(size * (1 + SPARE)), shutil.disk_usage(folder).free
        if needed > free:  # seldom: then it is worth looking for what has come already
            size -= sum(begun(self.cache.incoming / path) for path in missing)
            needed = int(size * (1 + SPARE))
        if needed > free:  # what killed runs have left of theirs
            remove_leftovers(scratch_root() / DECODED)
            free = shutil.disk_usage(folder).free
        if needed > free:
            raise StorageError(
                f"the data needs {megabytes(needed)} in {folder}, {megabytes(free)} are free",
                mend=f"set {SCRATCH_VARIABLE} to a folder on a larger disk, or free some space",
            )
        status = os.statvfs(folder)
        if status.f_files and files > status.f_favail:  # f_files is 0 where there is no limit
            raise StorageError(
                f"the data has {files} files, the disk of {folder} can take {status.f_favail} more",
                mend=f"set {SCRATCH_VARIABLE} to a folder on another disk",
            )

    def _fetch(
        self, units: Sequence[Whole | Span], plan: _Plan, content: SetContent, lock: int
    ) -> None:
        large = {unit.path for unit in units if isinstance(unit, Whole) and unit.is_large}

        def arrived(files: Sequence[Arrived]) -> None:
            entries = []
            for file in files:
                path = plan.file(file.path).path  # the worker's is a copy, and there may be many
                tag = plan.tags[path]
                entries.append(FileEntry(path, file.size, file.mtime_ns, tag, file.check))
            self.cache.record(entries)
            content.files |= {entry.path: entry for entry in entries}
            # The bytes of large ones have been told as they came.
            size = sum(file.size for file in files if file.path not in large)
            self._progress.advance(len(files), size)

        transfer(
            self._source.origin,
            units,
            self.cache.incoming,
            arrived=arrived,
            came=lambda size: self._progress.advance(0, size),
            stopped=self._stopped,
            lock=lock,
        )

    def _bring_archive(self, archive: Listed, plan: _Plan, content: SetContent, lock: int) -> None:
        """Fetch an archive, and put its files where the archive lies."""
        called = f"{self._source.uri}/{archive.path}"
        # The same name again for the same object, so that an interrupted fetch goes on.
        same = f"{archive.path} {archive.etag} {boot_id()}"
        name = hashlib.sha256(same.encode()).hexdigest()[:16] + Path(archive.path).name[-8:]
        unit = Whole(archive.key, archive.size, archive.etag, name)
        file = self.cache.archives / name
        if unit.is_large and file.exists():  # it got its name when it was complete
            self._progress.advance(1, unit.size)
        else:
            transfer(
                self._source.origin,
                [unit],
                self.cache.archives,
                arrived=lambda _: self._progress.advance(1, 0 if unit.is_large else unit.size),
                came=lambda size: self._progress.advance(0, size),
                stopped=self._stopped,
                lock=lock,
            )
        try:
            found = unpack(file, self.cache.unpacked, called=called, stopped=self._stopped)
        except DataError:
            file.unlink()
            raise
        file.unlink()
        parent = archive.path.rpartition("/")[0]
        paths = {f"{parent}/{name}" if parent else name: path for name, path in found.items()}
        for path in paths:
            check_path(path, f"{called}: {path}")
        check_collisions([*(plan.tags.keys() | content.files.keys()), *paths], called)
        entries = []
        for path, source in paths.items():
            target = self.cache.incoming / path
            check = f"crc32:{file_digest(source, 'crc32').hex()}"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            status = target.stat()
            entries.append(FileEntry(path, status.st_size, status.st_mtime_ns, archive.etag, check))
        entry = ArchiveEntry(archive.path, archive.etag, tuple(paths))
        self.cache.record(entries)
        self.cache.record_archive(entry)
        content.files |= {file.path: file for file in entries}
        content.archives[archive.path] = entry
        shutil.rmtree(self.cache.unpacked, ignore_errors=True)


def _fingerprint(listing: Sequence[Listed]) -> str:
    digest = hashlib.sha256()
    for item in sorted(listing, key=lambda item: item.path):
        digest.update(f"{item.path}\0{item.size}\0{item.etag}\n".encode())
    return digest.hexdigest()


def check_path(path: str, called: str) -> None:
    """Refuse what cannot be the path of a file below a folder, with a DataError."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in path:
        raise DataError(
            f"{called}: its key cannot be the name of a file (it has '..', '.' or '//' in it)",
            mend="rename or remove that object",
        )
    try:
        path.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{called.encode(errors='replace').decode()}: its name is not in UTF-8",
            mend="rename or remove that file",
        ) from None
    if any(len(part.encode()) > NAME_BYTES for part in parts):
        raise DataError(
            f"{called}: its name is too long for a file", mend="rename or remove that object"
        )


def check_collisions(paths: Sequence[str] | Mapping[str, Any], called: str) -> None:
    """Refuse two files of one name, and a file where others need a folder."""
    names: set[str] = set()
    for path in paths:
        if path in names:
            raise DataError(f"{called}: {path} comes twice", mend="remove one of the two")
        names.add(path)
    for path in names:
        parent = path
        while parent := parent.rpartition("/")[0]:
            if parent in names:
                raise DataError(
                    f"{called}: {parent} is an object and also the folder of {path}",
                    mend="rename or remove one of the two",
                )
