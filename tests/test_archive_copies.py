"""Copies of shards in a folder from which a cache evicts at any moment."""

from __future__ import annotations

from raysegment.archive.copies import Copies
from raysegment.archive.manifest import Manifest
from tests.small_archive import write_shards_of_one


def test_a_copy_that_is_evicted_as_soon_as_it_is_there_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    source = write_shards_of_one(tmp_path / "source", 2)
    copies, plain, evicted = Copies(tmp_path / "copies", Manifest.load(source).shards), Copies._line, []
    copies.prepare()
    data = [memoryview((source / shard.file).read_bytes()) for shard in copies.shards]
    copies.take(0, data[0])
    assert copies.whole() == {0}

    def evict(self, shard):
        if shard == 1:
            self.path(shard).unlink()
            evicted.append(shard)
        return plain(self, shard)

    monkeypatch.setattr(Copies, "_line", evict)
    copies.take(1, data[1])
    assert evicted == [1]
    assert copies.whole() == {0}
    assert (copies.read(0) == list(data[0])).all()
    (copies.path(1)).write_bytes(data[1])
    copies.whole()
    assert evicted == [1, 1], "between the look and the record"
    assert copies.whole() == {0}
