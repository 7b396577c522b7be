//! Outputs and gradients of others' code. A file that is not understood is a failure, not a skip.

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::{
    Adapters, AttentionConfig, Call, Dims, GroupedDifferentialConfig, LambdaInit, Mask, Observe, Rope, RopeLayout,
    SoftmaxConfig,
};
use polyhead_kernels::comparison::{Tolerance, assert_close};
use polyhead_models::weights::{self, Named};
use serde_json::Value;

use crate::world::project;

/// Of outputs, absolute.
pub const OUTPUT: f32 = 2e-5;
/// Of gradients, relative to the largest entry.
pub const GRADIENT: f32 = 1e-4;

#[test]
fn golden_gda() {
    check("gda", |config| {
        AttentionConfig::GroupedDifferential(GroupedDifferentialConfig {
            n_heads: size(config, "n_q_heads"),
            n_noise_heads: size(config, "n_noise"),
            n_kv_heads: Some(size(config, "n_kv_heads")),
            head_dim: Some(size(config, "head_dim")),
            lambda_init: LambdaInit::Constant(config["lambda_init"].as_f64().unwrap()),
            subln: true,
            subln_init: 1.0,
        })
    });
}

#[test]
fn golden_softmax() {
    check("softmax", |config| {
        AttentionConfig::Softmax(SoftmaxConfig {
            n_heads: size(config, "n_q_heads"),
            n_kv_heads: Some(size(config, "n_kv_heads")),
            head_dim: Some(size(config, "head_dim")),
            qkv_bias: config["has_bias"].as_bool().unwrap(),
            o_bias: false,
            qk_norm: false,
        })
    });
}

/// A whole number of a file's configuration.
pub fn size(config: &Value, key: &str) -> usize {
    config[key].as_u64().unwrap_or_else(|| panic!("config has no {key}")) as usize
}

/// `$POLYHEAD_GOLDEN/<method>` where it exists, else the project's own copy.
fn folder(method: &str) -> PathBuf {
    let elsewhere = std::env::var_os("POLYHEAD_GOLDEN").map(|root| PathBuf::from(root).join(method));
    elsewhere.filter(|path| path.is_dir()).unwrap_or_else(|| project().join("tests/golden").join(method))
}

/// A file of golden numbers.
pub struct Golden {
    /// Its name, for messages.
    pub name: String,
    /// What was computed.
    pub config: Value,
    /// From what, and with what result.
    pub tensors: BTreeMap<String, Named>,
}

/// All files of a method.
pub fn files(method: &str) -> Vec<Golden> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder(method)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ending| ending == "safetensors") {
            let bytes = std::fs::read(&path).unwrap();
            let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let header: Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
            let config = serde_json::from_str(header["__metadata__"]["config"].as_str().unwrap()).unwrap();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let tensors = tensors(&header, &bytes[8 + header_len..]);
            files.push(Golden { name, config, tensors });
        }
    }
    assert!(!files.is_empty(), "no golden files for {method}");
    files
}

/// All tensors; whole numbers become f32, which these files' are small enough for.
fn tensors(header: &Value, data: &[u8]) -> BTreeMap<String, Named> {
    let sizes = |list: &Value| -> Vec<usize> {
        list.as_array().unwrap().iter().map(|size| size.as_u64().unwrap() as usize).collect()
    };
    let tensor = |(name, about): (&String, &Value)| {
        let span = sizes(&about["data_offsets"]);
        let bytes = &data[span[0]..span[1]];
        let values = match about["dtype"].as_str() {
            Some("F32") => bytes.as_chunks::<4>().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect(),
            Some("I32") => bytes.as_chunks::<4>().0.iter().map(|&chunk| i32::from_le_bytes(chunk) as f32).collect(),
            Some("I64") => bytes.as_chunks::<8>().0.iter().map(|&chunk| i64::from_le_bytes(chunk) as f32).collect(),
            other => panic!("{name} has type {other:?}"),
        };
        (name.clone(), Named { name: name.clone(), shape: sizes(&about["shape"]), values })
    };
    header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__").map(tensor).collect()
}

fn check(method: &str, describe: impl Fn(&Value) -> AttentionConfig) {
    for golden in files(method) {
        check_file(golden, &describe);
    }
}

fn check_file(golden: Golden, describe: &impl Fn(&Value) -> AttentionConfig) {
    let Golden { name, mut config, tensors: file } = golden;
    config["has_bias"] = file.contains_key("w.q_proj.bias").into();

    let device = Device::flex().autodiff();
    let described = describe(&config);
    let rope = config["rope"].as_bool().unwrap();
    let dims = Dims { d_model: size(&config, "d_model"), n_layers: 1, layer: 0, rope, norm_eps: 1e-5 };
    described.validate(&dims).unwrap_or_else(|error| panic!("{name}: {error}"));
    let stored: BTreeMap<String, Named> =
        file.iter().filter_map(|(key, tensor)| Some((key.strip_prefix("w.")?.to_owned(), ours(key, tensor)))).collect();
    let stored = stored.into_iter().map(|(key, tensor)| (key.clone(), Named { name: key, ..tensor })).collect();
    let layer = weights::load(described.init(&dims, &device), stored).unwrap_or_else(|error| panic!("{name}: {error}"));

    let tensor = |key: &str| {
        let named = &file[key];
        Tensor::<3>::from_data(TensorData::new(named.values.clone(), named.shape.clone()), &device)
    };
    let layout = match config["rope_layout"].as_str() {
        Some("interleaved") => RopeLayout::Interleaved,
        Some("neox") => RopeLayout::RotateHalf,
        other => panic!("{name}: rope_layout {other:?}"),
    };
    let seq = size(&config, "seq");
    let theta = config["rope_theta"].as_f64().unwrap();
    let rope = rope.then(|| Rope::new(0..seq, size(&config, "head_dim"), theta, layout, &device));
    let mask = if config["causal"].as_bool().unwrap() { Mask::causal() } else { Mask::none() };
    let x = tensor("x").require_grad();
    let call = Call {
        rope: rope.as_ref(),
        mask: &mask,
        bias: None,
        cache: None,
        observe: Observe::Nothing,
        adapters: Adapters::default(),
    };
    let out = layer.forward(x.clone(), call).hidden;
    compare(&name, "out", &file["out"].values, &values(out.clone()), OUTPUT, false);

    let grads = (out * tensor("cotangent")).sum().backward();
    let grad_x = x.grad(&grads).unwrap();
    compare(&name, "grad.x", &file["grad.x"].values, &values(grad_x), GRADIENT, true);
    let found = gradients(&layer, &grads);
    let expected: Vec<&String> = file.keys().filter(|key| key.starts_with("grad.") && *key != "grad.x").collect();
    assert_eq!(expected.len(), found.len(), "{name}: as many gradients as parameters");
    for key in expected {
        let want = ours(key, &file[key]);
        let got = &found[key.strip_prefix("grad.").unwrap()];
        compare(&name, key, &want.values, got, GRADIENT, true);
    }
}

/// Linear weights are `[out, in]` in the files and `[in, out]` here.
fn ours(key: &str, tensor: &Named) -> Named {
    if tensor.shape.len() != 2 {
        return tensor.clone();
    }
    assert!(key.ends_with("_proj.weight"), "{key}");
    transposed(tensor)
}

/// A matrix with rows and columns exchanged.
pub fn transposed(tensor: &Named) -> Named {
    let [rows, columns] = tensor.shape[..] else { panic!("{} is no matrix", tensor.name) };
    let values = (0..rows * columns).map(|i| tensor.values[i % rows * columns + i / rows]).collect();
    Named { name: tensor.name.clone(), shape: vec![columns, rows], values }
}

/// A tensor's numbers.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// What a file calls its parameters, what they are called here, and how they lie.
pub type Names<'a> = &'a [(&'a str, &'a str, Layout)];

/// How a file's tensor lies here.
#[derive(Clone, Copy, PartialEq)]
pub enum Layout {
    /// As in the file.
    Same,
    /// A linear layer's weight, transposed.
    Linear,
}

/// A file's parameters, or their gradients, under the names and in the layout of here. Names that the file lacks are left out.
pub fn renamed(file: &BTreeMap<String, Named>, prefix: &str, names: Names<'_>) -> BTreeMap<String, Named> {
    let rename = |(theirs, ours, layout): &(&str, &str, Layout)| {
        let tensor = file.get(&format!("{prefix}{theirs}"))?;
        let tensor = if *layout == Layout::Linear { transposed(tensor) } else { tensor.clone() };
        Some(((*ours).to_owned(), Named { name: (*ours).to_owned(), ..tensor }))
    };
    names.iter().filter_map(rename).collect()
}

/// A tensor of a file, on a device.
pub fn tensor<const D: usize>(file: &BTreeMap<String, Named>, key: &str, device: &Device) -> Tensor<D> {
    let named = file.get(key).unwrap_or_else(|| panic!("the file has no {key}"));
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
    struct Collect<'a>(weights::Path, &'a burn::tensor::Gradients, BTreeMap<String, Vec<f32>>);
    impl burn::module::ModuleVisitor for Collect<'_> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.0.exit(container);
        }
        fn visit_float<const D: usize>(&mut self, param: &burn::module::Param<Tensor<D>>) {
            if let Some(grad) = param.val().grad(self.1) {
                self.2.insert(self.0.name(), values(grad));
            }
        }
    }
    let mut collect = Collect(weights::Path::default(), grads, BTreeMap::new());
    module.visit(&mut collect);
    collect.2
}

/// Fails unless `got` is within `tolerance` of `want`, absolute or relative to the largest number.
pub fn compare(file: &str, name: &str, want: &[f32], got: &[f32], tolerance: f32, relative: bool) {
    let tolerance = f64::from(tolerance);
    let tolerance = if relative { Tolerance::relative(tolerance) } else { Tolerance::absolute(tolerance) };
    assert_close(&format!("{file}: {name}"), got, want, tolerance);
}
