//! Sensitive indices, EigenScore and EES beside the authors' code and NumPy; see `tests/golden/send/README.md`.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use nalgebra::{DMatrix, DVector};
use polyhead_kernels::comparison::{Tolerance, assert_close};
use polyhead_models::{Gate, GateKind};
use polyhead_training::ees::{self, EesConfig, EesMode, Probes};
use polyhead_training::eigenscore::{EigenScore, matrix};
use polyhead_training::sensitivity::{self, Embedding, Pool, Rows};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::world::project;

/// Relative to the largest number, of what is computed in 64 bits.
const F64: f64 = 1e-9;
/// Of scores whose input was rounded to 32 bits.
const F32: f64 = 1e-4;

/// A case: its numbers by name, with shapes, and what its JSON says.
struct Case {
    name: String,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
    says: Value,
}

impl Case {
    fn values(&self, name: &str) -> &[f64] {
        &self.tensors.get(name).unwrap_or_else(|| panic!("{}: no {name}", self.name)).1
    }

    fn indices(&self, name: &str) -> Vec<usize> {
        self.values(name).iter().map(|&index| index as usize).collect()
    }

    fn matrix(&self, name: &str) -> DMatrix<f64> {
        let (shape, values) = &self.tensors[name];
        DMatrix::from_row_slice(shape[0], shape[1], values)
    }

    fn score(&self, path: &str) -> f64 {
        self.says["ees_and_eigenscore"].pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path}"))
    }

    fn near(&self, what: &str, got: &[f64], want: &[f64], tolerance: f64) {
        assert_close(&format!("{}: {what}", self.name), got, want, Tolerance::relative(tolerance));
    }
}

fn cases() -> Vec<Case> {
    let folder = project().join("tests/golden/send");
    let read = |number: usize| {
        let name = format!("case{number}");
        let bytes = std::fs::read(folder.join(format!("{name}.safetensors"))).unwrap();
        let says = serde_json::from_slice(&std::fs::read(folder.join(format!("{name}.json"))).unwrap()).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(|(name, view)| {
            let number = |eight: &[u8; 8]| match view.dtype() {
                Dtype::F64 => f64::from_le_bytes(*eight),
                Dtype::I64 => i64::from_le_bytes(*eight) as f64,
                other => panic!("{name} is {other:?}"),
            };
            (name.clone(), (view.shape().to_vec(), view.data().as_chunks::<8>().0.iter().map(number).collect()))
        });
        Case { name, tensors: tensors.collect(), says }
    };
    (1..=3).map(read).collect()
}

/// `[C][N]` vectors from `[C, N, d]`.
fn windows(values: &[f64], shape: [usize; 3]) -> Vec<Rows> {
    let [_, texts, width] = shape;
    values.chunks(texts * width).map(|rows| rows.chunks(width).map(<[f64]>::to_vec).collect()).collect()
}

#[test]
fn golden_sensitive_indices() {
    for case in cases() {
        let (shape, hidden) = &case.tensors["sens/H_checkpoint_sample_token_dim"];
        let [checkpoints, texts, tokens, width] = shape[..] else { panic!("{shape:?}") };
        let embed =
            |how| hidden.chunks(tokens * width).flat_map(|h| sensitivity::embed(h, width, how)).collect::<Vec<_>>();
        let [mean_last, second_last] = [Embedding::MeanLast, Embedding::SecondLast].map(embed);
        case.near("embedding", &mean_last, case.values("sens/sentence_embedding_paper"), F64);
        case.near("second last", &second_last, case.values("sens/embedding_second_to_last_token_official"), F64);

        let all = windows(&mean_last, [checkpoints, texts, width]);
        let window: Vec<&Rows> = all.iter().collect();
        let of_text =
            |text: usize| sensitivity::variability(&all.iter().map(|rows| &rows[text][..]).collect::<Vec<_>>());
        let each: Vec<f64> = (0..texts).flat_map(of_text).collect();
        case.near("V of each text", &each, case.values("sens/V_per_sample_paper"), F64);
        let v = sensitivity::pooled(&window, Pool::MeanV);
        case.near("V", &v, case.values("sens/V_mean_over_samples"), F64);
        let of_mean = sensitivity::pooled(&window, Pool::VOfMean);
        case.near("V of the mean", &of_mean, case.values("sens/V_of_mean_embedding"), F64);

        let k = case.says["sensitivity"]["shape"]["k"].as_f64().unwrap();
        let count = (k * width as f64) as usize;
        let dropped = sensitivity::largest(&v, count);
        assert_eq!(dropped, case.indices("sens/top_idx_V_mean_descending"), "{}", case.name);
        let keep: Vec<f64> = (0..width).map(|index| if dropped.contains(&index) { 0.0 } else { 1.0 }).collect();
        assert_eq!(keep, case.values("sens/keep_mask"), "{}", case.name);
        let sorted = |mut indices: Vec<usize>| {
            indices.sort_unstable();
            indices
        };
        let analysed = sensitivity::largest(&of_text(0), count);
        assert_eq!(sorted(analysed), sorted(case.indices("sens/official_analysis_top_idx_sample0")), "{}", case.name);

        let theirs = windows(&second_last, [checkpoints, texts, width]);
        let published = sensitivity::as_published(&theirs.iter().collect::<Vec<_>>());
        let chosen = sensitivity::largest(&published, count);
        let descending = |values: Vec<f64>| {
            let mut values = values;
            values.sort_by(|a, b| b.total_cmp(a));
            values
        };
        let got = descending(chosen.iter().map(|&index| published[index]).collect());
        let want = descending(case.values("sens/official_training_value").to_vec());
        case.near("V as published", &got, &want, F64);
        assert_eq!(sorted(chosen), sorted(case.indices("sens/official_training_top_idx")), "{}", case.name);
    }
}

#[test]
fn golden_drop() {
    for case in cases() {
        let device = Device::flex().autodiff();
        let tensor = |name: &str| {
            let (shape, values) = &case.tensors[name];
            let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
            Tensor::<3>::from_data(TensorData::new(values, shape.clone()), &device)
        };
        let keep: Vec<f32> = case.values("sens/keep_mask").iter().map(|&value| value as f32).collect();
        let kind = GateKind::Keep(Tensor::from_floats(keep.as_slice(), &Device::flex()));
        let x = tensor("drop/x").require_grad();
        let y = Gate { after_layer: 0, kind }.pass(x.clone());
        let values = |x: Tensor<3>| x.into_data().iter::<f64>().collect::<Vec<f64>>();
        case.near("y", &values(y.clone()), case.values("drop/y_no_rescale"), 1e-7);
        let grads = (y * tensor("drop/grad_out")).sum().backward();
        case.near("gradient", &values(x.grad(&grads).unwrap()), case.values("drop/grad_in"), 1e-7);
    }
}

#[test]
fn golden_ees() {
    for case in cases() {
        let x = case.matrix("ees/X");
        let (terms, width) = (case.score("/shape/M") as usize, x.ncols());
        let standardized = ees::standardized(&x);
        let start = DVector::from_column_slice(case.values("ees/power_b0"));
        let early = ees::power_method(&standardized, start.clone(), 1.0, 500);
        let sigma = ees::power_method(&standardized, start.normalize(), 1e-6, 1500);
        case.near("σ, early", &[early], &[case.score("/sigma_max/official_efficient_tol1")], F64);
        case.near("σ", &[sigma], &[case.score("/sigma_max/official_corr_tol1e6")], F64);
        let x = standardized / sigma;
        let golden = case.matrix("ees/X_normalised_by_corr_sigma");
        case.near("X", x.as_slice(), golden.as_slice(), F64);
        case.near("C", (x.transpose() * &x).as_slice(), case.matrix("ees/C").as_slice(), F64);

        let z = case.matrix("ees/Z");
        let unit = DMatrix::identity(width, width) * (width as f64).sqrt();
        let d = ees::moments(&x, &z, terms, false);
        let d_exact = ees::moments(&x, &unit, terms, false);
        case.near("d_m", &d, case.values("ees/d_m_official_0..M"), F64);
        case.near("d_m, exact", &d_exact, case.values("ees/d_m_exact_trace_0..M"), F64);
        let (official, dual) = (ees::official(terms), ees::dual(terms));
        case.near("c_m as published", &official, case.values("ees/c_m_official_highprec_1..M"), F64);
        case.near("c_m as published, by scipy", &official, case.values("ees/c_m_official_efficient_1..M"), F64);
        case.near("c_m, dual", &dual, case.values("ees/c_m_dual_0..M"), F64);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for (what, got, want) in [
            ("sum as published", dot(&official, &d[1..]), "/own_sum_official_parts(efficient c_m, stored Z, m=1..M)"),
            ("dual sum", dot(&dual, &d), "/own_paper_dual_basis(stored Z, m=0..M)"),
            ("dual sum, exact", dot(&dual, &d_exact), "/own_paper_dual_basis(exact trace, m=0..M)"),
        ] {
            case.near(what, &[got], &[case.score(want)], F64);
        }
        // The other of the authors' two files has 1/π and 200 probes. With scipy's coefficients, whose errors (1e-11 each)
        // count here: terms of both signs nearly cancel.
        let many = ees::moments(&x, &case.matrix("ees/Z_corr_200"), terms, false);
        let want = case.says["ees_and_eigenscore"]["official_corr_compute_eigenscore(limit=M, Nz=200, 1/pi)"].as_f64();
        case.near(
            "corr.py",
            &[dot(case.values("ees/c_m_official_efficient_1..M"), &many[1..]) / 2.0],
            &[want.unwrap()],
            F64,
        );

        for (alpha, name) in [(1e-3, "0.001"), (1e-2, "0.01")] {
            let c = ees::shifted(terms, alpha);
            let d = ees::moments(&x, &z, terms, true);
            case.near("shifted c_m", &c, case.values(&format!("ees/shifted_c_m_alpha{name}_0..M")), F64);
            case.near("shifted d_m", &d, case.values(&format!("ees/shifted_d_m_storedZ_alpha{name}_0..M")), F64);
            let of = |path: &str| case.score(&format!("/own_shifted_alpha{name}/{path}"));
            case.near("shifted sum", &[dot(&c, &d)], &[of("kpm_stored_Z")], F64);
            // And as a whole, from the answers to the score, in 64 and in 32 bits.
            let rounded = case.matrix("ees/X").map(|value| f64::from(value as f32));
            for (mode, path) in [(EesMode::Shifted, "kpm_exact_trace"), (EesMode::Exact, "exact_mean_log")] {
                let config = EesConfig { mode, terms, probes: Probes::Exact, n_probes: 1, alpha };
                case.near(path, &[config.of(&case.matrix("ees/X"), 1)], &[of(path)], F64);
                case.near(path, &[config.of(&rounded, 1)], &[of(path)], F32);
            }
        }
    }
}

#[test]
fn golden_eigenscore() {
    for case in cases() {
        let answers = case.matrix("eigenscore/Z_gen_by_dim");
        let rows: Rows = answers.row_iter().map(|row| row.iter().copied().collect()).collect();
        assert_eq!(matrix(&rows), answers);
        let says = &case.says["ees_and_eigenscore"];
        for (score, name) in [
            (EigenScore::Inside, "inside_paper(J_d, +1e-3 I, mean ln)"),
            (EigenScore::InsideCode, "inside_code(cov/(d-1), +1e-3 I, mean log10)"),
            (EigenScore::Regular, "official_regular_eigenscore(alpha=1e-5)"),
            (EigenScore::Analysis, "send_perturbation_compute_eigenscore(rows=generations, svd, sum ln / n)"),
        ] {
            case.near(name, &[score.of(&answers)], &[says[name].as_f64().unwrap()], F64);
        }
    }
}
