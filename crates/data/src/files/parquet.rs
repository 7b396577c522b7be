//! Rows of a Parquet file: row group after row group, and of each only the columns that are asked for.

mod zstandard;

use std::path::Path;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::open_file;
use super::rows::{Part, Place, Row, Take, none_of};
use crate::{DataError, guard};
use zstandard::Unpacking;

/// Hands over every row; `columns` of them, or all if that is empty.
pub(super) fn rows(path: &Path, columns: &[&str], take: &mut Take<'_>) -> Result<(), DataError> {
    let open = || SerializedFileReader::new(open_file(path)?).map_err(|cause| damaged(path, None, &cause));
    let reader = guarded((path, None), open)?;
    readable(&reader, path)?;
    let file = Arc::new(open_file(path)?);
    let columns = projection(&reader, path, columns)?;
    let mut number = 0;
    for group in 0..reader.num_row_groups() {
        let broken = |cause: ParquetError| damaged(path, Some(group), &cause);
        let place = (path, Some(group));
        let in_group = guarded(place, || reader.get_row_group(group).map_err(broken))?;
        let in_group = Unpacking { file: file.clone(), group: in_group };
        let mut rows = guarded(place, || RowIter::from_row_group(columns.clone(), &in_group).map_err(broken))?;
        while let Some(row) = guarded(place, || rows.next().transpose().map_err(broken))? {
            number += 1;
            let fields = row.get_column_iter().map(|(name, field)| (name.clone(), value(field)));
            let place = Place { path, line: number, part: Some(Part("row group", group)) };
            take(place, Row::Fields(Value::Object(fields.collect::<Map<_, _>>())))?;
        }
    }
    Ok(())
}

/// Refuses what is packed in another way than those that are read.
fn readable(reader: &dyn FileReader, path: &Path) -> Result<(), DataError> {
    let read = |packed: &Compression| {
        matches!(packed, Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::GZIP(_) | Compression::ZSTD(_))
    };
    let mut packed = reader.metadata().row_groups().iter().flat_map(|group| group.columns()).map(|it| it.compression());
    match packed.find(|packed| !read(packed)) {
        None => Ok(()),
        Some(packed) => Err(unusable!(
            "{} is packed by {packed}, which is not read: write it with compression = \"snappy\", \"gzip\" or \"zstd\"",
            path.display()
        )),
    }
}

/// What the file has of the columns that are asked for.
fn projection(reader: &dyn FileReader, path: &Path, columns: &[&str]) -> Result<Option<Type>, DataError> {
    let schema = reader.metadata().file_metadata().schema();
    if columns.is_empty() {
        return Ok(None);
    }
    let asked: Vec<Arc<Type>> =
        schema.get_fields().iter().filter(|field| columns.contains(&field.name())).cloned().collect();
    if asked.is_empty() {
        let there: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).collect();
        return Err(none_of(path, columns, &there));
    }
    let projected = Type::group_type_builder(schema.name()).with_fields(asked).build();
    projected.map(Some).map_err(|cause| damaged(path, None, &cause))
}

fn damaged(path: &Path, group: Option<usize>, cause: &ParquetError) -> DataError {
    let group = in_words(group);
    // The library writes a kind in front that says nothing.
    let cause = cause.to_string().replace("Parquet error: ", "");
    unusable!(
        "{}: this Parquet file cannot be read{group}: {cause}; if it is cut off or damaged, write or download it again",
        path.display()
    )
}

/// The library panics on some damaged files.
fn guarded<T>(
    (path, group): (&Path, Option<usize>),
    call: impl FnOnce() -> Result<T, DataError>,
) -> Result<T, DataError> {
    guard::guarded("parquet", call).unwrap_or_else(|problem| {
        let group = in_words(group);
        Err(DataError::in_file(
            path,
            format!("this Parquet file is damaged{group}: {problem}; write or download it again"),
        ))
    })
}

fn in_words(group: Option<usize>) -> String {
    group.map_or(String::new(), |group| format!(" in row group {group}"))
}

/// A value as JSON has it. Bytes that are not text have none; dates and the like are texts.
fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(yes) => (*yes).into(),
        Field::Byte(number) => (*number).into(),
        Field::Short(number) => (*number).into(),
        Field::Int(number) => (*number).into(),
        Field::Long(number) => (*number).into(),
        Field::UByte(number) => (*number).into(),
        Field::UShort(number) => (*number).into(),
        Field::UInt(number) => (*number).into(),
        Field::ULong(number) => (*number).into(),
        Field::Float(number) => f64::from(*number).into(),
        Field::Double(number) => (*number).into(),
        Field::Str(text) => text.as_str().into(),
        Field::Bytes(bytes) => bytes.as_utf8().map_or(Value::Null, Value::from),
        Field::Group(row) => row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect(),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let text = |key: &Field| value(key).as_str().map_or_else(|| key.to_string(), str::to_owned);
            map.entries().iter().map(|(key, item)| (text(key), value(item))).collect()
        }
        other => other.to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    /// Columns of a file that pyarrow wrote (`tests/rows/make.py`), or of one with these bytes.
    fn read(name: &str, bytes: Option<&[u8]>, columns: &[&str]) -> Result<Vec<(String, Value)>, String> {
        let dir = tempfile::tempdir().unwrap();
        let mut path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rows").join(name);
        if let Some(bytes) = bytes {
            path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
        }
        let mut all = Vec::new();
        let mut take = |place: Place<'_>, row: Row<'_>| {
            all.push((place.to_string(), row.value().unwrap()));
            Ok(())
        };
        rows(&path, columns, &mut take).map_err(|error| error.to_string())?;
        Ok(all)
    }

    #[test]
    fn columns_that_are_asked_for_are_read() {
        for name in ["texts.parquet", "gzip.parquet", "zstd.parquet"] {
            let all = read(name, None, &["text", "label"]).unwrap();
            assert_eq!(all.len(), 4);
            assert_eq!(all[1].1, json!({ "text": "zwei ü", "label": 1 }));
            assert!(all[2].0.ends_with(&format!("{name}: row 3")), "{}", all[2].0);
        }
        let all = read("texts.parquet", None, &[]).unwrap();
        assert_eq!(all[1].1, json!({ "text": "zwei ü", "label": 1, "score": null }));
        let error = read("texts.parquet", None, &["body"]).unwrap_err();
        assert!(error.contains("none of the columns body: it has text, label, score"), "{error}");
    }

    #[test]
    fn pages_of_version_2_are_unpacked_behind_their_levels() {
        let all = read("zstd_v2.parquet", None, &[]).unwrap();
        let text = |at: usize| (!at.is_multiple_of(7)).then(|| format!("row {at} {}", "ü".repeat(20)));
        let expected: Vec<Value> = (0..200).map(|at| json!({ "text": text(at) })).collect();
        assert_eq!(all.into_iter().map(|(_, row)| row).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_is_packed_in_a_way_that_is_not_read_is_refused_by_name() {
        let error = read("lz4.parquet", None, &[]).unwrap_err();
        assert!(
            error.contains("lz4.parquet is packed by LZ4_RAW") && error.contains("compression = \"snappy\""),
            "{error}"
        );
        let bytes = include_bytes!("../../tests/rows/zstd.parquet");
        for at in (4..bytes.len()).step_by(7) {
            let mut altered = bytes.to_vec();
            altered[at] ^= 0x55;
            let _ = read("any.parquet", Some(&altered), &[]); // an error or other values, never a panic
        }
    }

    #[test]
    fn lists_of_messages_are_read() {
        let all = read("chats.parquet", None, &[]).unwrap();
        let messages = json!([{ "role": "user", "content": "2?" }, { "role": "assistant", "content": "2!" }]);
        assert_eq!((&all[2].1["messages"], &all[0].1["image"]), (&messages, &Value::Null));
    }

    #[test]
    fn a_damaged_file_is_named_with_its_row_group() {
        let bytes = include_bytes!("../../tests/rows/texts.parquet");
        let whole = bytes.len();
        let cut = read("cut.parquet", Some(&bytes[..whole - 20]), &[]).unwrap_err();
        assert!(cut.contains("cut.parquet: this Parquet file"), "{cut}");
        // The pages of the second row group lie between the first one's and the footer.
        let mut altered = bytes.to_vec();
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rows/texts.parquet");
        let reader = SerializedFileReader::new(std::fs::File::open(file).unwrap()).unwrap();
        let start = reader.metadata().row_group(1).column(0).byte_range().0 as usize;
        altered[start..start + 30].fill(0xff);
        let error = read("altered.parquet", Some(&altered), &[]).unwrap_err();
        assert!(error.contains("altered.parquet: this Parquet file") && error.contains(" in row group 1: "), "{error}");
        // Where the library panics.
        let group = (Path::new("altered.parquet"), Some(1));
        let error = guarded(group, || -> Result<(), DataError> { panic!("out of bounds") }).unwrap_err().to_string();
        assert!(error.contains("altered.parquet: this Parquet file is damaged in row group 1: "), "{error}");
        assert!(error.contains("out of bounds"), "{error}");
        for at in (4..whole).step_by(7) {
            let mut altered = bytes.to_vec();
            altered[at] ^= 0x55;
            let _ = read("any.parquet", Some(&altered), &[]); // an error or other values, never a panic
        }
    }
}
