//! ZeroTuning by its authors' code; see `tests/golden/zero_tuning/README.md`.

use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Device, Tensor};
use polyhead_attention::{
    Amount, At, Call, Change, Dims, Edit, LayerSites, Mask, Mechanism, MechanismConfig, Positions, QuerySite, Rope,
    RopeLayout, Site, Sites, SoftmaxConfig,
};
use polyhead_models::intervention::zero_tuning;
use polyhead_models::sites::SitePlan;
use polyhead_models::weights::load;

use crate::golden::{GRADIENT, Golden, PROJECTIONS, compare, compare_gradients, files, renamed, size, tensor, values};
use crate::golden_decoder::{decoder, ids, run};

/// Of maps, heads, outputs and logits, relative to the largest.
const NUMBERS: f32 = 1e-5;

#[test]
fn golden_zero_tuning() {
    for golden in &files("zero_tuning") {
        match golden.config["kind"].as_str().unwrap() {
            "attention" => check_attention(golden),
            "decoder" => check_decoder(golden),
            other => panic!("{}: kind {other}", golden.name),
        }
    }
}

fn columns(golden: &Golden) -> std::ops::Range<usize> {
    let of = |at: usize| golden.config["columns"][at].as_u64().unwrap() as usize;
    of(0)..of(1)
}

fn check_attention(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    config.is("causal", true);
    config.is("rope", true);
    config.is("rope_layout", "neox");
    let (heads, width, seq) = (size(config, "n_heads"), size(config, "head_dim"), size(config, "seq"));
    config.beside_the_point(&["batch", "gamma"]);
    let described = SoftmaxConfig {
        n_heads: heads,
        n_kv_heads: Some(size(config, "n_kv_heads")),
        head_dim: Some(width),
        ..SoftmaxConfig::default()
    };
    let dims = Dims { d_model: size(config, "d_model"), n_layers: 1, layer: 0, rope: true, norm_eps: 1e-6, grid: None };
    let layer = load(described.init(&dims, &device), renamed(file, "w.", PROJECTIONS)).unwrap();
    let rope = Rope::new(0..seq, width, config["rope_theta"].as_f64().unwrap(), RopeLayout::RotateHalf, &device);
    let x = tensor::<3>(file, "x", &device).require_grad();
    let log_gamma = tensor::<1>(file, "log_gamma", &device).require_grad();
    let tuned = || -> Vec<Edit> {
        let all = log_gamma.clone().reshape([1, heads as i32]);
        zero_tuning(&all, columns(golden)).into_iter().map(|(_, edit)| edit).collect()
    };
    let mask = Mask::causal();
    let run = |edits: Vec<Edit>, taps: Vec<Site>| {
        let sites = LayerSites::new(0, edits, taps);
        let call =
            Call { rope: Some(&rope), sites: Sites { own: Some(&sites), ..Sites::default() }, ..Call::new(&mask) };
        let out = layer.forward(x.clone(), call).hidden;
        (out, sites.into_read().into_iter().map(|(_, values)| values).collect::<Vec<_>>())
    };
    let same = |key: &str, got: Vec<f32>| compare(name, key, &file[key].values, &got, NUMBERS, true);
    let weights: Site = QuerySite::Weights.into();
    same("attn.plain", values(run(Vec::new(), vec![weights]).1.remove(0)));
    let (_, read) = run(tuned(), vec![weights, QuerySite::Z.into()]);
    same("attn.tuned", values(read[0].clone()));
    same("z", values(read[1].clone().swap_dims(1, 2)));
    // Multiplied and normalised again, as the authors' code has it.
    let factor = log_gamma.clone().detach().exp().reshape([1, heads, 1, 1]);
    let at = At::all(QuerySite::Weights.into());
    let edit =
        Edit { keys: Positions::Range(columns(golden)), ..Edit::new(at, Change::Reweight(Amount::Each(factor))) };
    same("attn.tuned", values(run(vec![edit], vec![weights]).1.remove(0)));

    // In the kernel's blocks, with the gradients that they have.
    let (out, _) = run(tuned(), Vec::new());
    same("out", values(out.clone()));
    let grads = (out * tensor::<3>(file, "cotangent", &device)).sum().backward();
    compare_gradients(name, &layer, &grads, &renamed(file, "grad.", PROJECTIONS), GRADIENT);
    for (key, got) in
        [("grad.x", values(x.grad(&grads).unwrap())), ("grad.log_gamma", values(log_gamma.grad(&grads).unwrap()))]
    {
        compare(name, key, &file[key].values, &got, GRADIENT, true);
    }
}

fn check_decoder(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let model = decoder(&config.table("model"), file, "w.", &device);
    let tokens = ids(file, "ids", &device);
    let [batch, seq] = tokens.dims();
    assert_eq!([batch, seq], ["batch", "seq"].map(|key| size(config, key)));
    config.beside_the_point(&["gamma"]);
    let columns = columns(golden);
    let logits = |log_gamma: &Tensor<2>| {
        let edits = zero_tuning(log_gamma, columns.clone());
        run(&model, &tokens, SitePlan { edits, taps: Vec::new() }).0
    };
    let same = |key: &str, got: Vec<f32>| compare(name, key, &file[key].values, &got, NUMBERS, true);
    same("logits.base", values(run(&model, &tokens, SitePlan::default()).0));
    let log_gamma = tensor::<2>(file, "log_gamma", &device).require_grad();
    let tuned = logits(&log_gamma);
    same("logits", values(tuned.clone()));

    let targets = tokens.clone().narrow(1, 1, seq - 1).reshape([batch, seq - 1, 1]);
    let loss = log_softmax(tuned.narrow(1, 0, seq - 1), 2).gather(2, targets).mean().neg();
    same("loss", values(loss.clone()));
    let grad = log_gamma.grad(&loss.backward()).unwrap();
    compare(name, "grad.log_gamma", &file["grad.log_gamma"].values, &values(grad), GRADIENT, true);

    let (mut all, mut entropies) = (Vec::new(), Vec::new());
    for gamma in config["sweep"].as_array().unwrap() {
        let logits = logits(&Tensor::full(log_gamma.dims(), gamma.as_f64().unwrap().ln(), &device));
        let probabilities = softmax(logits.clone(), 2);
        let entropy = (probabilities * log_softmax(logits.clone(), 2)).sum_dim(2).neg();
        entropies.extend(values(entropy.mean_dim(1)));
        all.extend(values(logits));
    }
    same("sweep.logits", all);
    same("sweep.mean_entropy", entropies);
}
