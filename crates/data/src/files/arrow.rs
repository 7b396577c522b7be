//! Rows of an Arrow file, batch after batch, and of each only the columns that are asked for: a stream, as `datasets.save_to_disk` and
//! the hub's library write it, or a file (Feather), which is a stream between a mark and a footer.

use std::collections::{HashMap, HashSet};
use std::io::BufRead;
use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::temporal_conversions::as_datetime;
use arrow_array::types::{
    ArrowPrimitiveType, ArrowTemporalType, Date32Type, Date64Type, Float16Type, Float32Type, Float64Type, Int8Type,
    Int16Type, Int32Type, Int64Type, TimestampMicrosecondType, TimestampMillisecondType, TimestampNanosecondType,
    TimestampSecondType, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, RecordBatch};
use arrow_buffer::Buffer;
use arrow_ipc::reader::StreamDecoder;
use arrow_schema::{ArrowError, DataType, TimeUnit};
use serde_json::{Map, Value};

use super::rows::{Part, Place, Row, Take, none_of};
use super::{Search, read_text};
use crate::error::At;
use crate::{DataError, guard};

/// What a file begins with, which fills 8 bytes; a stream begins with what each of its messages does.
const FILE: &[u8] = b"ARROW1\0\0";
const MESSAGE: &[u8] = b"\xFF\xFF\xFF\xFF";

/// What the library says of bytes behind the end of a stream.
const BEHIND_THE_END: &str = "Unexpected EOS";

/// Whether a file that begins so is an Arrow file.
pub(super) fn begins(head: &[u8]) -> bool {
    head.starts_with(FILE) || head.starts_with(MESSAGE)
}

/// Hands over every row; `columns` of them, or all if that is empty.
pub(super) fn rows(
    path: &Path,
    mut content: impl BufRead,
    columns: &[&str],
    take: &mut Take<'_>,
) -> Result<(), DataError> {
    let in_file = content.fill_buf().at(path)?.starts_with(FILE);
    if in_file {
        content.consume(FILE.len());
    }
    let (mut decoder, mut number, mut batches) = (StreamDecoder::new(), 0, 0);
    loop {
        let piece = content.fill_buf().at(path)?;
        let (mut buffer, length) = (Buffer::from(piece), piece.len());
        if length == 0 {
            return guarded(path, batches, || decoder.finish());
        }
        // Behind the end of the stream there is the footer of a file.
        let mut next = || match decoder.decode(&mut buffer) {
            Err(ArrowError::IpcError(problem)) if in_file && problem == BEHIND_THE_END => Ok(None),
            decoded => decoded,
        };
        while let Some(batch) = guarded(path, batches, &mut next)? {
            for fields in in_rows(&batch, path, columns)? {
                number += 1;
                let place = Place { path, line: number, part: Some(Part("record batch", batches)) };
                take(place, Row::Fields(Value::Object(fields?)))?;
            }
            batches += 1;
        }
        if !buffer.is_empty() {
            return Ok(());
        }
        content.consume(length);
    }
}

/// The fields of every row.
fn in_rows<'a>(
    batch: &'a RecordBatch,
    path: &'a Path,
    columns: &[&str],
) -> Result<impl Iterator<Item = Result<Map<String, Value>, DataError>> + 'a, DataError> {
    let schema = batch.schema_ref();
    let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    let asked = |name: &str| columns.is_empty() || columns.contains(&name);
    let taken: Vec<(String, &dyn Array)> = (names.iter().zip(batch.columns()))
        .filter(|(name, _)| asked(name))
        .map(|(name, column)| ((*name).to_owned(), &**column))
        .collect();
    if taken.is_empty() {
        return Err(none_of(path, columns, &names));
    }
    Ok((0..batch.num_rows()).map(move |row| {
        let field = |(name, column): &(String, &dyn Array)| Ok((name.clone(), value(*column, row)?));
        let fields: Result<Map<_, _>, Unread> = taken.iter().map(field).collect();
        fields.map_err(|Unread(kind)| {
            unusable!("{} holds values of the Arrow type {kind}, which is not read: name other columns", path.display())
        })
    }))
}

/// A type whose values are not read.
struct Unread(DataType);

/// A value as JSON has it. Bytes that are not text have none; dates are texts.
fn value(array: &dyn Array, row: usize) -> Result<Value, Unread> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    let text = |bytes: &[u8]| std::str::from_utf8(bytes).map_or(Value::Null, Value::from);
    let list = |items: &dyn Array| (0..items.len()).map(|at| value(items, at)).collect::<Result<Vec<_>, _>>();
    Ok(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Int8 => number::<Int8Type>(array, row).into(),
        DataType::Int16 => number::<Int16Type>(array, row).into(),
        DataType::Int32 => number::<Int32Type>(array, row).into(),
        DataType::Int64 => number::<Int64Type>(array, row).into(),
        DataType::UInt8 => number::<UInt8Type>(array, row).into(),
        DataType::UInt16 => number::<UInt16Type>(array, row).into(),
        DataType::UInt32 => number::<UInt32Type>(array, row).into(),
        DataType::UInt64 => number::<UInt64Type>(array, row).into(),
        DataType::Float16 => number::<Float16Type>(array, row).to_f64().into(),
        DataType::Float32 => number::<Float32Type>(array, row).into(),
        DataType::Float64 => number::<Float64Type>(array, row).into(),
        DataType::Utf8 => array.as_string::<i32>().value(row).into(),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row).into(),
        DataType::Utf8View => array.as_string_view().value(row).into(),
        DataType::Binary => text(array.as_binary::<i32>().value(row)),
        DataType::LargeBinary => text(array.as_binary::<i64>().value(row)),
        DataType::BinaryView => text(array.as_binary_view().value(row)),
        DataType::FixedSizeBinary(_) => text(array.as_fixed_size_binary().value(row)),
        DataType::Date32 => date::<Date32Type>(array, row),
        DataType::Date64 => date::<Date64Type>(array, row),
        DataType::Timestamp(TimeUnit::Second, _) => date::<TimestampSecondType>(array, row),
        DataType::Timestamp(TimeUnit::Millisecond, _) => date::<TimestampMillisecondType>(array, row),
        DataType::Timestamp(TimeUnit::Microsecond, _) => date::<TimestampMicrosecondType>(array, row),
        DataType::Timestamp(TimeUnit::Nanosecond, _) => date::<TimestampNanosecondType>(array, row),
        DataType::List(_) => list(&array.as_list::<i32>().value(row))?.into(),
        DataType::LargeList(_) => list(&array.as_list::<i64>().value(row))?.into(),
        DataType::FixedSizeList(..) => list(&array.as_fixed_size_list().value(row))?.into(),
        DataType::Struct(fields) => {
            let columns = array.as_struct().columns();
            let field = |(name, column): (&String, &dyn Array)| Ok((name.clone(), value(column, row)?));
            let named = fields.iter().map(|field| field.name()).zip(columns.iter().map(|column| &**column));
            Value::Object(named.map(field).collect::<Result<_, Unread>>()?)
        }
        DataType::Map(..) => {
            let entries = array.as_map().value(row);
            let [keys, items] = [0, 1].map(|column| list(entries.column(column)));
            let name = |key: Value| key.as_str().map_or_else(|| key.to_string(), str::to_owned);
            Value::Object(keys?.into_iter().map(name).zip(items?).collect())
        }
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            let key = value(dictionary.keys(), row)?.as_u64().and_then(|key| usize::try_from(key).ok());
            key.filter(|&key| key < dictionary.values().len())
                .map_or(Ok(Value::Null), |key| value(&**dictionary.values(), key))?
        }
        other => return Err(Unread(other.clone())),
    })
}

fn number<T: ArrowPrimitiveType>(array: &dyn Array, row: usize) -> T::Native {
    array.as_primitive::<T>().value(row)
}

/// As Parquet's are written; null beyond the calendar.
fn date<T: ArrowTemporalType<Native: Into<i64>>>(array: &dyn Array, row: usize) -> Value {
    as_datetime::<T>(number::<T>(array, row).into()).map_or(Value::Null, |date| date.to_string().into())
}

/// The library may panic on a file that is damaged.
fn guarded<T>(path: &Path, batch: usize, call: impl FnOnce() -> Result<T, ArrowError>) -> Result<T, DataError> {
    let problem = match guard::guarded("arrow", call) {
        Ok(Ok(read)) => return Ok(read),
        Ok(Err(cause)) if cause.to_string().contains("IPC decompression requires") => {
            let problem =
                "this Arrow file is packed inside, which is not read: write it with compression=\"uncompressed\"";
            return Err(DataError::in_file(path, problem));
        }
        Ok(Err(cause)) => cause.to_string(),
        Err(panic) => panic,
    };
    let problem = format!(
        "this Arrow file cannot be read in record batch {batch}: {problem}; if it is cut off or damaged, write it again"
    );
    Err(DataError::in_file(path, problem))
}

/// Of a folder that `datasets` saved, the files that its `state.json` names are its rows: beside them the library keeps what it has
/// computed of them (`cache-*.arrow`).
///
/// # Errors
/// If a `state.json` cannot be read, or names a file that is not there.
pub(super) fn leave_out_caches(found: &mut Search) -> Result<(), DataError> {
    let mut states: HashMap<&Path, Option<HashSet<String>>> = HashMap::new();
    let mut caches = Vec::new();
    for (path, named) in &found.files {
        let (Some(folder), Some(file)) = (path.parent(), path.file_name()) else { continue };
        if *named || path.extension().is_none_or(|ending| ending != "arrow") {
            continue;
        }
        if !states.contains_key(folder) {
            states.insert(folder, saved_in(folder)?);
        }
        let rows = states[folder].as_ref();
        if rows.is_some_and(|rows| !rows.contains(&*file.to_string_lossy())) {
            caches.push(path.clone());
        }
    }
    for cache in caches {
        found.files.remove(&cache);
        found.left_out.add("that state.json does not name", &cache);
    }
    Ok(())
}

/// The files that a folder's `state.json` names; `None` where it has none.
fn saved_in(folder: &Path) -> Result<Option<HashSet<String>>, DataError> {
    let path = folder.join("state.json");
    if !path.is_file() {
        return Ok(None);
    }
    let state: Value = serde_json::from_str(&read_text(&path).at(&path)?)
        .map_err(|cause| DataError::in_file(&path, format!("this is not the state of a saved data set: {cause}")))?;
    let Some(files) = state["_data_files"].as_array() else { return Ok(None) };
    let names: HashSet<String> = files.iter().filter_map(|file| file["filename"].as_str()).map(str::to_owned).collect();
    match names.iter().find(|name| !folder.join(name).is_file()) {
        None => Ok(Some(names)),
        Some(missing) => Err(DataError::in_file(
            &path,
            format!("it names {missing}, which is not there: save the data set again, or copy all of its files"),
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::super::rows::{for_each_row, rows_of};
    use super::*;
    use crate::testing::Folder;

    type Read = Result<Vec<(String, Value)>, String>;

    fn read(path: &Path, columns: &[&str]) -> Read {
        let mut all = Vec::new();
        let mut take = |place: Place<'_>, row: Row<'_>| {
            all.push((place.to_string(), row.value().unwrap()));
            Ok(())
        };
        let found = rows_of(&[path.display().to_string()]).map_err(|error| error.to_string())?;
        for_each_row(&found, columns, &mut take).map_err(|error| error.to_string())?;
        Ok(all)
    }

    /// A file of `tests/rows/make.py`.
    fn made(name: &str, columns: &[&str]) -> Read {
        read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rows").join(name), columns)
    }

    #[test]
    fn streams_and_files_are_the_same_rows_as_parquet() {
        for name in ["texts.arrow", "texts.feather"] {
            for columns in [&[][..], &["text", "label"]] {
                let (found, same) = (made(name, columns).unwrap(), made("texts.parquet", columns).unwrap());
                let rows = |of: &Read| of.as_ref().unwrap().iter().map(|(_, row)| row.clone()).collect::<Vec<_>>();
                assert_eq!(rows(&Ok(found.clone())), rows(&Ok(same)), "{name}");
                assert!(found[2].0.ends_with(&format!("{name}: row 3")), "{}", found[2].0);
            }
            let error = made(name, &["body"]).unwrap_err();
            assert!(error.contains("none of the columns body: it has text, label, score"), "{error}");
        }
    }

    #[test]
    fn every_type_is_what_json_has_for_it_or_named() {
        let mut all = made("types.arrow", &[]).unwrap_err();
        assert!(all.contains("types.arrow holds values of the Arrow type") && all.contains("Duration"), "{all}");
        let columns = ["messages", "map", "image", "when", "day", "half", "view", "fixed", "yes", "nothing", "large"];
        let rows = made("types.arrow", &columns).unwrap();
        let messages = json!([{ "role": "user", "content": "2?" }, { "role": "assistant", "content": "2!" }]);
        assert_eq!((&rows[2].1["messages"], &rows[0].1["image"]), (&messages, &Value::Null));
        all = serde_json::to_string(&rows[1].1).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&all).unwrap(),
            json!({
                "messages": [{ "role": "user", "content": "1?" }, { "role": "assistant", "content": "1!" }],
                "map": { "a": 1 }, "image": null, "when": "2026-11-28 09:30:00.000001", "day": "2026-11-28 00:00:00", "half": 1.5,
                "view": "one", "fixed": [1, 2], "yes": true, "nothing": null, "large": ["x"],
            })
        );
    }

    #[test]
    fn what_is_packed_inside_is_refused() {
        let error = made("packed.feather", &[]).unwrap_err();
        assert!(error.contains("packed.feather: this Arrow file is packed inside, which is not read"), "{error}");
    }

    #[test]
    fn what_is_damaged_is_named_and_never_panics() {
        let dir = Folder::new();
        for name in ["texts.arrow", "texts.feather", "types.arrow"] {
            let whole = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rows").join(name)).unwrap();
            let error = read(&dir.write("cut.arrow", &whole[..whole.len() / 2]), &[]).unwrap_err();
            assert!(error.contains("cut.arrow: this Arrow file cannot be read in record batch "), "{error}");
            for at in (8..whole.len()).step_by(5) {
                let mut altered = whole.clone();
                altered[at] ^= 0x55;
                let _ = rows(Path::new("any.arrow"), &altered[..], &[], &mut |_, _| Ok(())); // an error or other values
            }
        }
    }

    #[test]
    fn two_streams_in_a_file_are_refused() {
        let texts = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rows/texts.arrow")).unwrap();
        let error = read(&Folder::new().write("two.arrow", texts.repeat(2)), &[]).unwrap_err();
        assert!(error.contains("two.arrow: this Arrow file cannot be read in record batch 2: "), "{error}");
    }

    #[test]
    fn of_a_saved_data_set_the_rows_are_read_and_not_its_caches() {
        let texts = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rows/texts.arrow")).unwrap();
        let dir = Folder::new();
        let state = json!({ "_data_files": [{ "filename": "data-00000-of-00001.arrow" }] }).to_string();
        for split in ["train", "test"] {
            dir.write(&format!("{split}/data-00000-of-00001.arrow"), &texts);
            dir.write(&format!("{split}/cache-0123.arrow"), &texts);
            dir.write(&format!("{split}/state.json"), &state);
            dir.write(&format!("{split}/dataset_info.json"), "{}");
        }
        dir.write("dataset_dict.json", r#"{"splits": ["train", "test"]}"#);
        assert_eq!(read(&dir.path().join("train"), &["text"]).unwrap().len(), 4);
        let sides = super::super::sides(&[dir.path().display().to_string()], &[]).unwrap();
        assert_eq!(sides.train.files.len(), 1);
        assert!(sides.train.left_out.note().unwrap().contains("2 that state.json does not name"));
        assert!(sides.notes[0].contains("train (1 file) is trained on; left out: test (1 file)"), "{:?}", sides.notes);
        // A file that is named itself is read.
        assert_eq!(read(&dir.path().join("train/cache-0123.arrow"), &["text"]).unwrap().len(), 4);
        std::fs::remove_file(dir.path().join("train/data-00000-of-00001.arrow")).unwrap();
        let error = read(&dir.path().join("train"), &[]).unwrap_err();
        assert!(error.contains("state.json: it names data-00000-of-00001.arrow, which is not there"), "{error}");
    }
}
