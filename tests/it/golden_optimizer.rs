//! Weights after steps of others' optimisers, with the same gradients.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_models::weights::{self, Named, Path};
use polyhead_training::config::{AdamwConfig, MuonConfig, OptimizerConfig};
use polyhead_training::gradients::{clip_factor, global_norm};
use polyhead_training::optimizer::{Optimizer, Update};
use serde_json::Value;

use crate::golden::{Golden, compare, files};

/// Relative to the largest weight of a tensor.
const WEIGHT: f32 = 1e-6;

/// Parameters by the names that a decoder has.
#[derive(Module, Debug)]
struct Model {
    embedding: Param<Tensor<2>>,
    layers: Vec<Layer>,
    norm: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Layer {
    square: Param<Tensor<2>>,
    wide: Param<Tensor<2>>,
    tall: Param<Tensor<2>>,
    vector: Param<Tensor<1>>,
}

#[test]
fn golden_optimizer() {
    for golden in files("optimizer") {
        check_file(&golden);
    }
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors } = golden;
    let optimizer_config = describe(config);
    let device = Device::flex().autodiff();
    let mut model = weights::load(empty(tensors, &device), under(tensors, "w.")).unwrap();
    let mut optimizer = Optimizer::new(optimizer_config.clone());
    let rates = config["lr"].as_array().unwrap();
    for (index, lr) in rates.iter().enumerate() {
        let step = index + 1;
        let (mut grads, inner) = (GradientsParams::new(), device.clone().inner());
        let mut given = under(tensors, &format!("grad.{step}."));
        model = model.map(&mut Give { given: &mut given, grads: &mut grads, device: &inner, path: Path::default() });
        assert!(given.is_empty(), "{name}: gradients of no parameter: {:?}", given.keys());
        let norm = global_norm(&grads, &model);
        compare(name, "the norm", &tensors["norms"].values[index..step], &[norm as f32], WEIGHT, true);

        let scale = clip_factor(norm, number(config, "max_norm"));
        model = optimizer.step(model, &mut grads, Update { lr: lr.as_f64().unwrap(), scale });
        let after = under(tensors, &format!("after.{step}."));
        let found = weights::named(&model);
        assert_eq!(after.len(), found.len(), "{name}: as many weights as parameters");
        for got in found {
            let key = format!("{} after step {step}", got.name);
            compare(name, &key, &after[&got.name].values, &got.values, WEIGHT, true);
        }
        // As a run that is interrupted after every step would go on.
        let saved = optimizer.tensors().into_iter().map(|tensor| (tensor.name.clone(), tensor.named())).collect();
        optimizer = Optimizer::restore(optimizer_config.clone(), optimizer.steps(), saved, &inner).unwrap();
    }
}

fn describe(config: &Value) -> OptimizerConfig {
    let n = |key| number(config, key);
    let (lr, beta1, beta2, eps, weight_decay) = (1.0, n("beta1"), n("beta2"), n("eps"), n("weight_decay"));
    match config["optimizer"].as_str() {
        Some("adamw") => OptimizerConfig::Adamw(AdamwConfig { lr, beta1, beta2, eps, weight_decay }),
        Some("muon") => {
            let momentum = n("momentum");
            OptimizerConfig::Muon(MuonConfig { lr, momentum, weight_decay, beta1, beta2, eps })
        }
        other => panic!("optimizer {other:?}"),
    }
}

fn number(config: &Value, key: &str) -> f64 {
    config[key].as_f64().unwrap_or_else(|| panic!("config has no {key}"))
}

/// The tensors whose keys begin with `prefix`, by the rest of their keys.
fn under(tensors: &BTreeMap<String, Named>, prefix: &str) -> BTreeMap<String, Named> {
    let rest = |(key, tensor): (&String, &Named)| {
        let name = key.strip_prefix(prefix)?.to_owned();
        Some((name.clone(), Named { name, ..tensor.clone() }))
    };
    tensors.iter().filter_map(rest).collect()
}

/// A model of the file's shapes.
fn empty(tensors: &BTreeMap<String, Named>, device: &Device) -> Model {
    let matrix = |name: &str| {
        let shape: [usize; 2] = tensors[&format!("w.{name}")].shape.clone().try_into().unwrap();
        Param::from_tensor(Tensor::zeros(shape, device))
    };
    let vector = |name: &str| Param::from_tensor(Tensor::zeros([tensors[&format!("w.{name}")].shape[0]], device));
    let layer = Layer {
        square: matrix("layers.0.square"),
        wide: matrix("layers.0.wide"),
        tall: matrix("layers.0.tall"),
        vector: vector("layers.0.vector"),
    };
    Model { embedding: matrix("embedding"), layers: vec![layer], norm: vector("norm") }
}

/// Hands every parameter its gradient, as a backward pass would.
struct Give<'a> {
    given: &'a mut BTreeMap<String, Named>,
    grads: &'a mut GradientsParams,
    device: &'a Device,
    path: Path,
}

impl ModuleMapper for Give<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        self.path.exit(container);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.path.name();
        let grad = self.given.remove(&name).unwrap_or_else(|| panic!("no gradient of {name}"));
        self.grads.register(param.id, Tensor::<D>::from_data(TensorData::new(grad.values, grad.shape), self.device));
        param
    }
}
