//! Files of golden numbers. A file is compared whole: a tensor or an option that no test has looked at is a failure, not a skip.
//!
//! `$POLYHEAD_GOLDEN/<folder>` is read where it exists, else the project's own copy (`tests/golden/<folder>`).

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use polyhead_kernels::comparison::{Tolerance, assert_close};
use polyhead_models::weights::{self, Named};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::world::project;

/// Of outputs, absolute.
pub const OUTPUT: f32 = 2e-5;
/// Of gradients, relative to the largest entry.
pub const GRADIENT: f32 = 1e-4;

/// Settings that say where numbers come from, and not what was computed.
const ORIGIN: [&str; 4] = ["seed", "source", "provenance", "verified"];

/// A whole number of a file's configuration.
pub fn size(config: &impl for<'a> std::ops::Index<&'a str, Output = Value>, key: &str) -> usize {
    config[key].as_u64().unwrap_or_else(|| panic!("config has no {key}")) as usize
}

/// `$POLYHEAD_GOLDEN/<method>` where it exists, else the project's own copy.
pub fn folder(method: &str) -> PathBuf {
    let elsewhere = std::env::var_os("POLYHEAD_GOLDEN").map(|root| PathBuf::from(root).join(method));
    elsewhere.filter(|path| path.is_dir()).unwrap_or_else(|| project().join("tests/golden").join(method))
}

/// A file of golden numbers.
pub struct Golden {
    /// Its name, for messages.
    pub name: String,
    /// What was computed: the key `config` of its metadata; nothing where there is none.
    pub config: Config,
    /// The JSON file of the same name, where there is one.
    pub beside: Option<Config>,
    /// From what, and with what result.
    pub tensors: Tensors,
}

/// All files of a method, in the order of their names.
pub fn files(method: &str) -> Vec<Golden> {
    let entries = std::fs::read_dir(folder(method)).unwrap().map(|entry| entry.unwrap().path());
    let (mut numbers, mut texts) = (Vec::new(), BTreeSet::new());
    for path in entries {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("safetensors") => numbers.push(path),
            Some("json") => _ = texts.insert(path),
            _ => {}
        }
    }
    assert!(!numbers.is_empty(), "no golden files for {method}");
    numbers.sort();
    let files = numbers.iter().map(|path| open(path, texts.take(&path.with_extension("json")).as_deref())).collect();
    assert!(texts.is_empty(), "{method}: {texts:?} describe no tensors");
    files
}

fn open(path: &Path, beside: Option<&Path>) -> Golden {
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let bytes = std::fs::read(path).unwrap();
    let broken = |error: &dyn std::fmt::Display| -> ! { panic!("{name}: {error}") };
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap_or_else(|error| broken(&error));
    let config = header.metadata().as_ref().and_then(|metadata| metadata.get("config"));
    let config = config.map_or(Value::Null, |text| serde_json::from_str(text).unwrap_or_else(|error| broken(&error)));
    let tensors = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| broken(&error));
    let beside = beside.map(|path| {
        let value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap_or_else(|error| broken(&error));
        Config::new(path.file_name().unwrap().to_string_lossy().into_owned(), value)
    });
    Golden { config: Config::new(name.clone(), config), beside, tensors: Tensors::new(name.clone(), &tensors), name }
}

/// Settings of a file. Those that nobody has read by the end of the test fail it.
pub struct Config {
    path: String,
    value: Value,
    unread: RefCell<BTreeSet<String>>,
}

impl Config {
    fn new(path: String, value: Value) -> Self {
        let keys = value.as_object().into_iter().flat_map(|table| table.keys().cloned());
        let unread = keys.filter(|key| !ORIGIN.contains(&&**key)).collect();
        Self { path, value, unread: RefCell::new(unread) }
    }

    /// What is at a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.unread.borrow_mut().remove(key);
        self.value.get(key).filter(|value| !value.is_null())
    }

    /// A table of settings, which has to be read whole too.
    pub fn table(&self, key: &str) -> Config {
        let value = self.get(key).unwrap_or_else(|| panic!("{} has no {key}", self.path));
        Config::new(format!("{}, {key}", self.path), value.clone())
    }

    /// Settings that decide nothing in the numbers.
    pub fn beside_the_point(&self, keys: &[&str]) {
        keys.iter().for_each(|&key| _ = self.unread.borrow_mut().remove(key));
    }

    /// Fails unless a setting that the project has no choice of is this one, or is not given.
    pub fn is(&self, key: &str, only: impl Into<Value>) {
        let only = only.into();
        let value = self.get(key).unwrap_or(&only);
        let same = value == &only || value.as_f64().is_some_and(|value| Some(value) == only.as_f64());
        assert!(same, "{}: {key} is {value}; there is nothing but {only}", self.path);
    }
}

impl std::ops::Index<&str> for Config {
    type Output = Value;

    fn index(&self, key: &str) -> &Value {
        self.unread.borrow_mut().remove(key);
        &self.value[key]
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        let unread = self.unread.borrow();
        assert!(std::thread::panicking() || unread.is_empty(), "{}: no test knows the settings {unread:?}", self.path);
    }
}

/// Tensors of a file. Those that nobody has read by the end of the test fail it.
pub struct Tensors {
    file: String,
    all: BTreeMap<String, (Named, Vec<f64>)>,
    unread: RefCell<BTreeSet<String>>,
}

impl Tensors {
    fn new(file: String, tensors: &SafeTensors<'_>) -> Self {
        let named = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            let wide = numbers(&name, view.dtype(), view.data());
            let values = wide.iter().map(|&value| value as f32).collect();
            (name.clone(), (Named { name, shape: view.shape().to_vec(), values }, wide))
        };
        let all: BTreeMap<_, _> = tensors.tensors().into_iter().map(named).collect();
        let unread = RefCell::new(all.keys().cloned().collect());
        Self { file, all, unread }
    }

    /// The tensor of this name.
    pub fn get(&self, key: &str) -> Option<&Named> {
        self.unread.borrow_mut().remove(key);
        self.all.get(key).map(|(named, _)| named)
    }

    /// Its numbers as they are in the file, without rounding to f32.
    pub fn wide(&self, key: &str) -> &[f64] {
        self.unread.borrow_mut().remove(key);
        &self.all.get(key).unwrap_or_else(|| panic!("{} has no {key}", self.file)).1
    }

    /// Whether there is one.
    pub fn contains_key(&self, key: &str) -> bool {
        self.all.contains_key(key)
    }

    /// All names.
    pub fn keys(&self) -> impl Iterator<Item = &String> {
        self.all.keys()
    }

    /// Those whose names begin with a prefix, by what is behind it.
    pub fn under(&self, prefix: &str) -> BTreeMap<String, Named> {
        let rest = |key: &String| {
            let name = key.strip_prefix(prefix)?.to_owned();
            Some((name.clone(), Named { name, ..self[key.as_str()].clone() }))
        };
        self.all.keys().filter_map(rest).collect()
    }
}

impl std::ops::Index<&str> for Tensors {
    type Output = Named;

    fn index(&self, key: &str) -> &Named {
        self.get(key).unwrap_or_else(|| panic!("{} has no {key}", self.file))
    }
}

impl Drop for Tensors {
    fn drop(&mut self) {
        let unread = self.unread.borrow();
        assert!(std::thread::panicking() || unread.is_empty(), "{}: no test knows the tensors {unread:?}", self.file);
    }
}

/// A tensor's numbers; f64 holds all of these types but the largest whole numbers.
fn numbers(name: &str, dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&four| f64::from(f32::from_le_bytes(four))).collect(),
        Dtype::F64 => bytes.as_chunks::<8>().0.iter().map(|&eight| f64::from_le_bytes(eight)).collect(),
        Dtype::I32 => bytes.as_chunks::<4>().0.iter().map(|&four| f64::from(i32::from_le_bytes(four))).collect(),
        Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|&eight| i64::from_le_bytes(eight) as f64).collect(),
        Dtype::U8 | Dtype::BOOL => bytes.iter().map(|&byte| f64::from(byte)).collect(),
        other => panic!("{name} has type {other:?}"),
    }
}

/// A matrix, or the weights of a 1 x 1 convolution, with rows and columns exchanged.
pub fn transposed(tensor: &Named) -> Named {
    let ([rows, columns] | [rows, columns, 1, 1]) = tensor.shape[..] else { panic!("{} is no matrix", tensor.name) };
    let values = (0..rows * columns).map(|i| tensor.values[i % rows * columns + i / rows]).collect();
    Named { name: tensor.name.clone(), shape: vec![columns, rows], values }
}

/// A tensor's numbers.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// What a file calls its parameters, what they are called here, and how they lie.
pub type Names<'a> = &'a [(&'a str, &'a str, Layout)];

/// The four maps of a layer whose files call them as we do.
pub const PROJECTIONS: Names<'static> = &[
    ("q_proj.weight", "q_proj.weight", Layout::Linear),
    ("k_proj.weight", "k_proj.weight", Layout::Linear),
    ("v_proj.weight", "v_proj.weight", Layout::Linear),
    ("o_proj.weight", "o_proj.weight", Layout::Linear),
];

/// How a file's tensor lies here.
#[derive(Clone, Copy, PartialEq)]
pub enum Layout {
    /// As in the file.
    Same,
    /// A linear layer's weight, transposed.
    Linear,
}

/// A file's parameters, or their gradients, under the names and in the layout of here. Names that the file lacks are left out.
pub fn renamed(file: &Tensors, prefix: &str, names: Names<'_>) -> BTreeMap<String, Named> {
    let rename = |(theirs, ours, layout): &(&str, &str, Layout)| {
        let tensor = file.get(&format!("{prefix}{theirs}"))?;
        let tensor = if *layout == Layout::Linear { transposed(tensor) } else { tensor.clone() };
        Some(((*ours).to_owned(), Named { name: (*ours).to_owned(), ..tensor }))
    };
    names.iter().filter_map(rename).collect()
}

/// A tensor of a file, on a device.
pub fn tensor<const D: usize>(file: &Tensors, key: &str, device: &Device) -> Tensor<D> {
    let named = &file[key];
    Tensor::from_data(TensorData::new(named.values.clone(), named.shape.clone()), device)
}

/// The gradients of all parameters are the file's, which are as many.
pub fn compare_gradients<M: burn::module::Module>(
    file: &str,
    module: &M,
    grads: &burn::tensor::Gradients,
    want: &BTreeMap<String, Named>,
    tolerance: f32,
) {
    let found = gradients(module, grads);
    assert_eq!(found.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{file}: a gradient per parameter");
    for (key, got) in found {
        compare(file, &format!("grad.{key}"), &want[&key].values, &got, tolerance, true);
    }
}

/// The gradients of those parameters that have one, by name.
pub fn gradients<M: burn::module::Module>(module: &M, grads: &burn::tensor::Gradients) -> BTreeMap<String, Vec<f32>> {
    struct Collect<'a>(&'a burn::tensor::Gradients, BTreeMap<String, Vec<f32>>);
    impl weights::ParameterVisitor for Collect<'_> {
        fn visit<const D: usize>(&mut self, name: String, param: &burn::module::Param<Tensor<D>>) {
            if let Some(grad) = param.val().grad(self.0) {
                self.1.insert(name, values(grad));
            }
        }
    }
    weights::visit_parameters(module, Collect(grads, BTreeMap::new())).1
}

/// Fails unless `got` is within `tolerance` of `want`, absolute or relative to the largest number.
pub fn compare(file: &str, name: &str, want: &[f32], got: &[f32], tolerance: f32, relative: bool) {
    let tolerance = f64::from(tolerance);
    let tolerance = if relative { Tolerance::relative(tolerance) } else { Tolerance::absolute(tolerance) };
    assert_close(&format!("{file}: {name}"), got, want, tolerance);
}

/// The sum of products that files call their loss.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32
}
