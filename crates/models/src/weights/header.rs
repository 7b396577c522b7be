//! The header of a safetensors file: what the library reads, and besides that no name twice, of which it would keep the last
//! without a word.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use safetensors::SafeTensorError;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

/// Bytes that hold the length of the header.
const LENGTH: usize = 8;
/// The library's own limit, in bytes.
const LONGEST: usize = 100_000_000;
/// Where the metadata stands.
const METADATA: &str = "__metadata__";

/// What a file holds: tensors in the order of their values, and where the values begin.
#[derive(Debug)]
pub(super) struct Header {
    pub tensors: Vec<(String, TensorInfo)>,
    pub metadata: HashMap<String, String>,
    pub start: usize,
}

/// Reads the header of a whole file and checks it against the file's length: every byte belongs to one tensor.
///
/// # Errors
/// What is wrong, as a sentence.
pub(super) fn read(file: &[u8]) -> Result<Header, String> {
    let words = |error: SafeTensorError| error.to_string();
    let length = file.first_chunk::<LENGTH>().ok_or_else(|| words(SafeTensorError::HeaderTooSmall))?;
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > LONGEST {
        return Err(format!("the header is {length} bytes long by its first 8 bytes; {LONGEST} are allowed"));
    }
    let start = LENGTH + length;
    let text = file.get(LENGTH..start).ok_or_else(|| {
        let there = file.len() - LENGTH;
        format!(
            "the header is {length} bytes long by its first 8 bytes, and only {there} follow: the file is cut short"
        )
    })?;
    let text = std::str::from_utf8(text).map_err(|error| words(SafeTensorError::InvalidHeader(error)))?;
    let Entries(mut tensors, metadata) =
        serde_json::from_str(text).map_err(|error| format!("invalid header: {error}"))?;
    let mut names = BTreeSet::new();
    if let Some((name, _)) = tensors.iter().find(|(name, _)| !names.insert(name)) {
        return Err(format!("tensor {name:?} occurs in the header twice: each name may occur once"));
    }
    drop(names);
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let checked = Metadata::new(None, tensors.iter().map(|(name, info)| (name.clone(), info.clone())).collect());
    let (needed, there) = (checked.map_err(words)?.data_len(), file.len() - start);
    if needed != there {
        let how = if needed > there { "the file is cut short" } else { "bytes stand behind the last tensor" };
        return Err(format!("its tensors take {needed} bytes, and {there} follow the header: {how}"));
    }
    Ok(Header { tensors, metadata, start })
}

/// The tensors of a header, in its order, and its metadata.
struct Entries(Vec<(String, TensorInfo)>, HashMap<String, String>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with a tensor under each name")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let (mut tensors, mut metadata) = (Vec::new(), HashMap::new());
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        metadata = map.next_value::<Option<HashMap<String, String>>>()?.unwrap_or_default();
                        continue;
                    }
                    let info = map.next_value().map_err(|error| A::Error::custom(format!("{name:?}: {error}")))?;
                    tensors.push((name, info));
                }
                Ok(Entries(tensors, metadata))
            }
        }
        deserializer.deserialize_map(All)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn tensor(name: &str, from: usize, to: usize) -> String {
        format!("\"{name}\":{{\"dtype\":\"F32\",\"shape\":[{}],\"data_offsets\":[{from},{to}]}}", (to - from) / 4)
    }

    #[test]
    fn a_sound_header_is_read_in_the_order_of_its_values() {
        let text = format!("{{{},\"__metadata__\":{{\"format\":\"pt\"}},{}}}", tensor("b", 8, 12), tensor("a", 0, 8));
        let header = read(&file(&text, 12)).unwrap();
        assert_eq!((header.start, header.metadata["format"].as_str()), (8 + text.len(), "pt"));
        assert_eq!(header.tensors.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert!(read(&file("{}", 0)).unwrap().tensors.is_empty());
    }

    #[test]
    fn what_is_broken_is_said() {
        let info = |dtype: &str, shape: &str, offsets: &str| {
            format!("{{\"w\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":{offsets}}}}}")
        };
        let mut far = file("{}", 0);
        far[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        let mut long = file("{}", 0);
        long[0] = 90;
        for (bytes, words) in [
            (file(&format!("{{{},{}}}", tensor("w", 0, 8), tensor("w", 0, 8)), 8), "\"w\" occurs in the header twice"),
            (file(&format!("{{{},{}}}", tensor("w", 0, 8), tensor("v", 4, 12)), 12), "nvalid offset for tensor `v`"),
            (file(&format!("{{{}}}", tensor("w", 0, 8)), 4), "take 8 bytes, and 4 follow"),
            (file(&format!("{{{}}}", tensor("w", 0, 8)), 9), "bytes stand behind the last tensor"),
            (file(&info("F32", "[4294967296,4294967296,4294967296]", "[0,0]"), 0), "overflow"),
            (file(&info("F32", "[-1]", "[0,0]"), 0), "\"w\": invalid value"),
            (file(&info("F32", "[1]", "[4,0]"), 4), "nvalid"),
            (file(&info("F33", "[1]", "[0,4]"), 4), "\"w\": unknown variant `F33`"),
            (file("[]", 0), "an object with a tensor under each name"),
            (far, "100000000 are allowed"),
            (long, "90 bytes long by its first 8 bytes, and only 2 follow"),
            (vec![0; 7], "header"),
        ] {
            let error = read(&bytes).unwrap_err();
            assert!(error.contains(words), "{error:?} does not say {words:?}");
        }
    }

    #[test]
    fn a_million_names_take_time_in_proportion() {
        let all: Vec<String> = (0..200_000).map(|at| tensor(&format!("t{at}"), 4 * at, 4 * at + 4)).collect();
        let header = read(&file(&format!("{{{}}}", all.join(",")), 800_000)).unwrap();
        assert_eq!(header.tensors.len(), 200_000);
    }
}
