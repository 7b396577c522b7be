//! Weights after steps of others' optimisers, with the same gradients.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_models::weights::{self, Named, ParameterMapper, TensorFiles, map_parameters, write_safetensors};
use polyhead_training::config::{AdamwConfig, MuonConfig, OptimizerConfig};
use polyhead_training::gradients::{clip_factor, global_norm};
use polyhead_training::optimizer::{Optimizer, Update};

use crate::golden::{Config, Golden, Tensors, compare, files};

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
    files("optimizer").iter().for_each(check_file);
}

fn check_file(golden: &Golden) {
    let Golden { name, config, tensors, .. } = golden;
    // What the given gradients were multiplied by when they were drawn.
    config.beside_the_point(&["gradient_scale"]);
    let optimizer_config = describe(config);
    let device = Device::flex().autodiff();
    let mut model = weights::load(empty(tensors, &device), tensors.under("w.")).unwrap();
    let mut optimizer = Optimizer::new(optimizer_config.clone());
    let rates = config["lr"].as_array().unwrap();
    assert_eq!(tensors["norms"].shape, [rates.len()], "{name}: a norm and a rate for each step");
    for (index, lr) in rates.iter().enumerate() {
        let step = index + 1;
        let (mut grads, inner) = (GradientsParams::new(), device.clone().inner());
        let mut given = tensors.under(&format!("grad.{step}."));
        model = map_parameters(model, Give { given: &mut given, grads: &mut grads, device: &inner }).0;
        assert!(given.is_empty(), "{name}: gradients of no parameter: {:?}", given.keys());
        let norm = global_norm(&grads, &model);
        compare(name, "the norm", &tensors["norms"].values[index..step], &[norm as f32], WEIGHT, true);

        let scale = clip_factor(norm, number(config, "max_norm"));
        model = optimizer.step(model, &mut grads, Update { lr: lr.as_f64().unwrap(), scale });
        let after = tensors.under(&format!("after.{step}."));
        let found = weights::named(&model);
        assert_eq!(after.len(), found.len(), "{name}: as many weights as parameters");
        for got in found {
            let key = format!("{} after step {step}", got.name);
            compare(name, &key, &after[&got.name].values, &got.values, WEIGHT, true);
        }
        // As a run that is interrupted after every step would go on.
        let file = tempfile::NamedTempFile::new().unwrap();
        write_safetensors(&optimizer.tensors(), &[], &mut file.as_file()).unwrap();
        let saved = TensorFiles::open(&[file.path().to_owned()]).unwrap();
        optimizer = Optimizer::restore(optimizer_config.clone(), optimizer.steps(), &saved, &inner).unwrap();
    }
}

fn describe(config: &Config) -> OptimizerConfig {
    let n = |key| number(config, key);
    let (lr, beta1, beta2, eps, weight_decay) = (1.0, n("beta1"), n("beta2"), n("eps"), n("weight_decay"));
    match config["optimizer"].as_str() {
        Some("adamw") => {
            assert!(config["momentum"].is_null(), "AdamW has no momentum of its own");
            OptimizerConfig::Adamw(AdamwConfig { lr, beta1, beta2, eps, weight_decay, decay_vectors: false })
        }
        Some("muon") => {
            let momentum = n("momentum");
            OptimizerConfig::Muon(MuonConfig { lr, momentum, weight_decay, beta1, beta2, eps })
        }
        other => panic!("optimizer {other:?}"),
    }
}

fn number(config: &Config, key: &str) -> f64 {
    config[key].as_f64().unwrap_or_else(|| panic!("config has no {key}"))
}

/// A model of the file's shapes.
fn empty(tensors: &Tensors, device: &Device) -> Model {
    let matrix = |name: &str| {
        let shape: [usize; 2] = tensors[format!("w.{name}").as_str()].shape.clone().try_into().unwrap();
        Param::from_tensor(Tensor::zeros(shape, device))
    };
    let vector =
        |name: &str| Param::from_tensor(Tensor::zeros([tensors[format!("w.{name}").as_str()].shape[0]], device));
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
}

impl ParameterMapper for Give<'_> {
    fn map<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let grad = self.given.remove(&name).unwrap_or_else(|| panic!("no gradient of {name}"));
        self.grads.register(param.id, Tensor::<D>::from_data(TensorData::new(grad.values, grad.shape), self.device));
        param
    }
}
