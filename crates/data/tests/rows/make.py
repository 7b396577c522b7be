"""Writes the files that the tests of src/files/parquet.rs and src/files/arrow.rs read. Needs pyarrow (written with 25)."""
import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

here = Path(__file__).parent
turn = pa.struct([("role", pa.string()), ("content", pa.string())])
chats = pa.table({
    "id": pa.array([1, 2, 3]),
    "messages": pa.array([[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}] for i in range(3)], pa.list_(turn)),
    "image": pa.array([b"\xff\xd8\xff", None, b""], pa.binary()),
})
pq.write_table(chats, here / "chats.parquet", row_group_size=2)
texts = pa.table({
    "text": pa.array(["one", "zwei \u00fc", "three", "four"]).dictionary_encode(),
    "label": pa.array([0, 1, 0, 1], pa.int8()),
    "score": pa.array([0.5, None, 1.5, 2.5]),
})
pq.write_table(texts, here / "texts.parquet", row_group_size=2)
pq.write_table(texts, here / "gzip.parquet", compression="gzip")
pq.write_table(texts, here / "zstd.parquet", compression="zstd")
# Pages of version 2 are packed where that makes them smaller.
many = pa.table({"text": pa.array([None if at % 7 == 0 else f"row {at} " + "\u00fc" * 20 for at in range(200)])})
pq.write_table(many, here / "zstd_v2.parquet", compression="zstd", data_page_version="2.0", use_dictionary=False)
pq.write_table(texts, here / "lz4.parquet", compression="lz4")

with pa.OSFile(str(here / "texts.arrow"), "wb") as file, pa.ipc.new_stream(file, texts.schema) as stream:
    stream.write_table(texts, max_chunksize=2)
feather.write_feather(texts, here / "texts.feather", compression="uncompressed", chunksize=2)
feather.write_feather(texts, here / "packed.feather", compression="lz4")
when = datetime.datetime(2026, 11, 28, 9, 30, 0, 1)
types = pa.table({
    "messages": chats["messages"],
    "map": pa.array([[], [("a", 1)], None], pa.map_(pa.string(), pa.int32())),
    "image": chats["image"],
    "when": pa.array([None, when, when], pa.timestamp("us")),
    "day": pa.array([None, when.date(), None], pa.date32()),
    "half": pa.array([0.5, 1.5, None], pa.float16()),
    "view": pa.array(["null", "one", "two, which is longer than twelve"], pa.string_view()),
    "fixed": pa.array([[0, 1], [1, 2], None], pa.list_(pa.uint16(), 2)),
    "yes": pa.array([False, True, None]),
    "nothing": pa.nulls(3),
    "large": pa.array([[], ["x"], None], pa.large_list(pa.large_string())),
    "took": pa.array([1, 2, 3], pa.duration("s")),
})
with pa.OSFile(str(here / "types.arrow"), "wb") as file, pa.ipc.new_stream(file, types.schema) as stream:
    stream.write_table(types, max_chunksize=2)
