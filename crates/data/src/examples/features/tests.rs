#![allow(clippy::unwrap_used)]

use half::{bf16, f16};
use polyhead_models::Inputs;

use super::*;
use crate::testing::Folder;
use crate::{DataConfig, ExampleLoader, Labelled, OpenOptions, Tokenizer};

impl Folder {
    /// A safetensors file with these tensors.
    fn tensors(&self, name: &str, tensors: &[(&str, Dtype, &[usize], &[u8])], classes: Option<&str>) -> PathBuf {
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            ((*name).to_owned(), TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
        });
        let metadata = classes.map(|text| HashMap::from([("classes".to_owned(), text.to_owned())]));
        self.write(name, safetensors::serialize(views.collect::<Vec<_>>(), metadata).unwrap())
    }

    /// As NumPy 1 and 2 write an array.
    fn npy(&self, name: &str, descr: &str, shape: &str, bytes: &[u8]) -> PathBuf {
        let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
        while !(10 + header.len() + 1).is_multiple_of(64) {
            header.push(' ');
        }
        header.push('\n');
        let length = (header.len() as u16).to_le_bytes();
        self.write(name, [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), bytes].concat())
    }
}

/// 40 rows of 2 layers of 3 numbers that are exact in every type: row, layer and place can be read off.
fn values() -> Vec<f32> {
    (0..240).map(|at| at as f32 * 0.5 - 8.0).collect()
}

fn bytes_of<const N: usize>(values: &[f32], write: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|value| write(*value)).collect()
}

fn labels() -> Vec<u8> {
    (0..40i64).flat_map(|row| (row % 3).to_le_bytes()).collect()
}

fn config(paths: Vec<PathBuf>) -> FeaturesConfig {
    FeaturesConfig { paths, labels: Vec::new(), validation_paths: Vec::new(), validation_labels: Vec::new() }
}

fn open(config: &FeaturesConfig) -> Result<Labelled, DataError> {
    let options = OpenOptions { validation_fraction: 0.3, ..crate::tests::options(1, 7, 3) };
    DataConfig::Features(config.clone()).open_examples(&Tokenizer::bytes(), &options)
}

/// An epoch of a side, in the order of the files.
fn rows(loader: &ExampleLoader) -> Vec<(Vec<f32>, u32)> {
    let mut all = Vec::new();
    for position in 0..loader.batches_per_epoch() {
        let batch = loader.batch(position).unwrap();
        let Inputs::Features { values, layers: 2, dim: 3 } = batch.inputs else { panic!("no features of that shape") };
        all.extend(values.chunks(6).map(<[f32]>::to_vec).zip(batch.labels));
    }
    all.sort_by(|a, b| a.0[0].total_cmp(&b.0[0]));
    all.dedup();
    all
}

/// Both sides.
fn all_rows(data: &Labelled) -> Vec<(Vec<f32>, u32)> {
    let mut all = [rows(&data.train), rows(&data.validation)].concat();
    all.sort_by(|a, b| a.0[0].total_cmp(&b.0[0]));
    all
}

#[test]
fn every_type_and_both_formats_are_the_same_rows() {
    let files = Folder::new();
    let expected: Vec<(Vec<f32>, u32)> =
        values().chunks(6).enumerate().map(|(row, values)| (values.to_vec(), row as u32 % 3)).collect();
    let kinds: [(Dtype, &str, Vec<u8>); 4] = [
        (Dtype::F32, "<f4", bytes_of(&values(), f32::to_le_bytes)),
        (Dtype::F64, "<f8", bytes_of(&values(), |value| f64::from(value).to_le_bytes())),
        (Dtype::F16, "<f2", bytes_of(&values(), |value| f16::from_f32(value).to_le_bytes())),
        (Dtype::BF16, "", bytes_of(&values(), |value| bf16::from_f32(value).to_le_bytes())),
    ];
    let narrow: Vec<u8> = (0..40u8).map(|row| row % 3).collect();
    for (dtype, descr, bytes) in kinds {
        let tensors = [("features", dtype, &[40, 2, 3][..], &bytes[..]), ("labels", Dtype::I64, &[40], &labels())];
        let named = Some(r#"["a", "b", "c", "d"]"#);
        let set = open(&config(vec![files.tensors("all.safetensors", &tensors, named)])).unwrap();
        assert_eq!(all_rows(&set), expected, "{dtype:?}");
        assert_eq!((rows(&set.train).len(), rows(&set.validation).len()), (28, 12));
        assert_eq!(set.classes, ["a", "b", "c", "d"]);
        assert_eq!(set.counts.iter().sum::<u64>(), 28);
        if descr.is_empty() {
            continue;
        }
        let features = files.npy("x.npy", descr, "(40, 2, 3)", &bytes);
        let labels = vec![files.npy("y.npy", "|u1", "(40,)", &narrow)];
        let set = open(&FeaturesConfig { labels, ..config(vec![features]) }).unwrap();
        assert_eq!(all_rows(&set), expected, "{descr}");
        assert_eq!(set.classes, ["0", "1", "2"]);
    }
}

#[test]
fn several_files_are_one_set_and_files_to_validate_on_are_taken_whole() {
    let files = Folder::new();
    let bytes = bytes_of(&values(), f32::to_le_bytes);
    let file = |name: &str, rows: std::ops::Range<usize>| {
        let part = &bytes[rows.start * 24..rows.end * 24];
        let labels = &labels()[rows.start * 8..rows.end * 8];
        let shape = [rows.len(), 2, 3];
        files.tensors(
            name,
            &[("features", Dtype::F32, &shape, part), ("labels", Dtype::I64, &shape[..1], labels)],
            None,
        )
    };
    let (whole, half, rest) = (file("whole", 0..40), file("half", 0..20), file("rest", 20..40));
    let set = |paths: Vec<PathBuf>| open(&config(paths)).unwrap();
    let (all, parts) = (set(vec![whole.clone()]), set(vec![half.clone(), rest.clone()]));
    assert_eq!(rows(&all.validation), rows(&parts.validation));
    assert_eq!(all.text_hash, set(vec![whole]).text_hash);
    assert_ne!(all.text_hash, set(vec![half.clone()]).text_hash);
    let set = open(&FeaturesConfig { validation_paths: vec![rest], ..config(vec![half]) }).unwrap();
    assert_eq!((rows(&set.train).len(), rows(&set.validation).len()), (20, 20));
    assert_eq!(rows(&set.validation)[0].0, values()[120..126]);
}

#[test]
fn what_cannot_be_used_is_named() {
    let files = Folder::new();
    let bytes = bytes_of(&values(), f32::to_le_bytes);
    let message = |config: FeaturesConfig| open(&config).err().unwrap().to_string();
    let tensors = |tensors: &[(&str, Dtype, &[usize], &[u8])], classes: Option<&str>| {
        message(config(vec![files.tensors("file.safetensors", tensors, classes)]))
    };
    let features = ("features", Dtype::F32, &[40, 2, 3][..], &bytes[..]);
    let label = labels();
    let mut negative = label.clone();
    negative[..8].copy_from_slice(&(-1i64).to_le_bytes());
    let mut infinite = bytes.clone();
    infinite[24..28].copy_from_slice(&f32::INFINITY.to_le_bytes());
    for (found, words) in [
        (tensors(&[features], None), "no tensor \"labels\" (\"features\" there)"),
        (tensors(&[features, ("labels", Dtype::I64, &[8, 5], &label)], None), "labels are [40], one a row"),
        (tensors(&[features, ("labels", Dtype::F32, &[40], &bytes[..160])], None), "holds F32: labels are whole"),
        (tensors(&[features, ("labels", Dtype::I64, &[40], &negative)], None), "the label of row 0 is -1"),
        (
            tensors(&[features, ("labels", Dtype::I64, &[40], &label)], Some("[\"a\"]")),
            "labels go up to 2, and 1 classes are named",
        ),
        (tensors(&[("features", Dtype::F32, &[240], &bytes), ("labels", Dtype::I64, &[40], &label)], None), "is [240]"),
        (tensors(&[("features", Dtype::I32, &[40, 2, 3], &bytes), ("labels", Dtype::I64, &[40], &label)], None), "I32"),
        (
            tensors(&[("features", Dtype::F32, &[40, 2, 3], &infinite), ("labels", Dtype::I64, &[40], &label)], None),
            "row 1 holds inf",
        ),
        (message(config(vec!["nowhere.safetensors".into()])), "nowhere.safetensors"),
        (message(config(vec![files.write("a.safetensors", b"no such file")])), "not a safetensors file"),
    ] {
        assert!(found.contains(words), "{words}: {found}");
    }
    let npy = |x: PathBuf| {
        let labels = vec![files.npy("y.npy", "<i8", "(40,)", &label)];
        message(FeaturesConfig { labels, ..config(vec![x]) })
    };
    for (found, words) in [
        (npy(files.write("x.npy", b"text")), "not a .npy file"),
        (npy(files.npy("x.npy", ">f4", "(40, 2, 3)", &bytes)), "holds >f4"),
        (npy(files.npy("x.npy", "<f4", "(40, 2, 4)", &bytes)), "its length is not"),
        (npy(files.npy("x.npy", "<f4", "(18446744073709551615, 9)", &bytes)), "its length is not"),
    ] {
        assert!(found.contains(words), "{words}: {found}");
    }
    let pair = config(vec!["x.npy".into()]);
    assert_eq!(pair.validate(0).unwrap_err().field, "labels");
}

#[test]
fn what_is_written_is_read_back() {
    let files = Folder::new();
    let labels: Vec<u32> = (0..40).map(|row| row % 3).collect();
    let classes = ["sad", "glad", "\"odd\""].map(String::from).to_vec();
    let new = NewFeatures { values: values(), n_layers: 2, dim: 3, labels: labels.clone(), classes: classes.clone() };
    let path = files.write("new.safetensors", new.to_safetensors().unwrap());
    let set = open(&config(vec![path])).unwrap();
    let (read, labels_read): (Vec<_>, Vec<_>) = all_rows(&set).into_iter().unzip();
    assert_eq!((read.concat(), labels_read), (values(), labels));
    assert_eq!(set.classes, classes);
    assert!(NewFeatures { n_layers: 3, ..new }.to_safetensors().is_err());
}
