//! Sensitive indices, EigenScore and EES beside the authors' code and NumPy; see `tests/golden/send/README.md`.

use burn::tensor::{Device, Tensor};
use nalgebra::{DMatrix, DVector};
use polyhead_evaluation::ees::{self, EesConfig, EesMode, Probes};
use polyhead_evaluation::eigenscore::{EigenScore, matrix};
use polyhead_evaluation::sensitivity::{self, Embedding, Pool, Rows};
use polyhead_kernels::comparison::{Tolerance, assert_close};
use polyhead_models::{Gate, GateKind};

use crate::golden::{self, Config, Golden, files, size};

/// Relative to the largest number, of what is computed in 64 bits.
const F64: f64 = 1e-9;
/// Of scores whose input was rounded to 32 bits.
const F32: f64 = 1e-4;

/// A case: its numbers in 64 bits, and what its JSON says.
struct Case(Golden);

impl Case {
    fn values(&self, name: &str) -> &[f64] {
        self.0.tensors.wide(name)
    }

    fn shape(&self, name: &str) -> &[usize] {
        &self.0.tensors[name].shape
    }

    fn indices(&self, name: &str) -> Vec<usize> {
        self.values(name).iter().map(|&index| index as usize).collect()
    }

    fn matrix(&self, name: &str) -> DMatrix<f64> {
        let [rows, columns] = self.shape(name)[..] else { panic!("{}: {name} is no matrix", self.0.name) };
        DMatrix::from_row_slice(rows, columns, self.values(name))
    }

    fn near(&self, what: &str, got: &[f64], want: &[f64], tolerance: f64) {
        assert_close(&format!("{}: {what}", self.0.name), got, want, Tolerance::relative(tolerance));
    }
}

fn score(says: &Config, key: &str) -> f64 {
    says[key].as_f64().unwrap_or_else(|| panic!("no {key}"))
}

#[test]
fn golden_send() {
    for mut golden in files("send") {
        let says = golden.beside.take().unwrap_or_else(|| panic!("{}: no JSON file beside it", golden.name));
        // Where the numbers come from; and that the published training scripts' score does not depend on the model, which
        // a test beside `ees.rs` shows.
        says.beside_the_point(&["versions", "official_training_script_EES_on_three_unrelated_arrays_same_probe_seed"]);
        let case = Case(golden);
        check_sensitivity(&case, &says.table("sensitivity"));
        check_drop(&case);
        let scores = says.table("ees_and_eigenscore");
        check_ees(&case, &scores);
        check_eigenscore(&case, &scores);
    }
}

/// `[C][N]` vectors from `[C, N, d]`.
fn windows(values: &[f64], shape: [usize; 3]) -> Vec<Rows> {
    let [_, texts, width] = shape;
    values.chunks(texts * width).map(|rows| rows.chunks(width).map(<[f64]>::to_vec).collect()).collect()
}

fn check_sensitivity(case: &Case, says: &Config) {
    let hidden = case.values("sens/H_checkpoint_sample_token_dim");
    let shape = says.table("shape");
    let [checkpoints, texts, tokens, width] = ["C", "N", "m", "d"].map(|key| size(&shape, key));
    assert_eq!(case.shape("sens/H_checkpoint_sample_token_dim"), [checkpoints, texts, tokens, width]);
    let embed = |how| hidden.chunks(tokens * width).flat_map(|h| sensitivity::embed(h, width, how)).collect::<Vec<_>>();
    let [mean_last, second_last] = [Embedding::MeanLast, Embedding::SecondLast].map(embed);
    case.near("embedding", &mean_last, case.values("sens/sentence_embedding_paper"), F64);
    case.near("second last", &second_last, case.values("sens/embedding_second_to_last_token_official"), F64);

    let all = windows(&mean_last, [checkpoints, texts, width]);
    let window: Vec<&Rows> = all.iter().collect();
    let of_text = |text: usize| sensitivity::variability(&all.iter().map(|rows| &rows[text][..]).collect::<Vec<_>>());
    let each: Vec<f64> = (0..texts).flat_map(of_text).collect();
    case.near("V of each text", &each, case.values("sens/V_per_sample_paper"), F64);
    let v = sensitivity::pooled(&window, Pool::MeanV);
    case.near("V", &v, case.values("sens/V_mean_over_samples"), F64);
    let of_mean = sensitivity::pooled(&window, Pool::VOfMean);
    case.near("V of the mean", &of_mean, case.values("sens/V_of_mean_embedding"), F64);

    let k = score(&shape, "k");
    let count = (k * width as f64) as usize;
    let dropped = sensitivity::largest(&v, count);
    assert_eq!(dropped, case.indices("sens/top_idx_V_mean_descending"), "{}", case.0.name);
    let keep: Vec<f64> = (0..width).map(|index| if dropped.contains(&index) { 0.0 } else { 1.0 }).collect();
    assert_eq!(keep, case.values("sens/keep_mask"), "{}", case.0.name);
    let sorted = |mut indices: Vec<usize>| {
        indices.sort_unstable();
        indices
    };
    let analysed = sensitivity::largest(&of_text(0), count);
    assert_eq!(sorted(analysed), sorted(case.indices("sens/official_analysis_top_idx_sample0")), "{}", case.0.name);

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
    let both = chosen.iter().filter(|index| dropped.contains(index)).count();
    let overlap = [both as f64 / dropped.len() as f64];
    case.near("overlap", &overlap, &[score(says, "overlap_paper_vs_official_training")], F64);
    assert_eq!(sorted(chosen), sorted(case.indices("sens/official_training_top_idx")), "{}", case.0.name);
}

fn check_drop(case: &Case) {
    let device = Device::flex().autodiff();
    let tensor = |name: &str| golden::tensor::<3>(&case.0.tensors, name, &device);
    let keep: Vec<f32> = case.values("sens/keep_mask").iter().map(|&value| value as f32).collect();
    let kind = GateKind::Keep(Tensor::from_floats(keep.as_slice(), &Device::flex()));
    let x = tensor("drop/x").require_grad();
    let y = Gate { after_layer: 0, kind }.pass(x.clone());
    let values = |x: Tensor<3>| x.into_data().iter::<f64>().collect::<Vec<f64>>();
    case.near("y", &values(y.clone()), case.values("drop/y_no_rescale"), 1e-7);
    let grads = (y * tensor("drop/grad_out")).sum().backward();
    case.near("gradient", &values(x.grad(&grads).unwrap()), case.values("drop/grad_in"), 1e-7);
}

fn check_ees(case: &Case, says: &Config) {
    let x = case.matrix("ees/X");
    let shape = says.table("shape");
    let [terms, width] = ["M", "K"].map(|key| size(&shape, key));
    assert_eq!(
        (case.shape("ees/X"), case.shape("ees/Z")),
        (&[size(&shape, "n"), width][..], &[width, size(&shape, "Nz")][..])
    );
    let standardized = ees::standardized(&x);
    let start = DVector::from_column_slice(case.values("ees/power_b0"));
    let sigmas = says.table("sigma_max");
    let early = ees::power_method(&standardized, start.clone(), 1.0, 500);
    let sigma = ees::power_method(&standardized, start.normalize(), 1e-6, 1500);
    case.near("σ, early", &[early], &[score(&sigmas, "official_efficient_tol1")], F64);
    case.near("σ", &[sigma], &[score(&sigmas, "official_corr_tol1e6")], F64);
    case.near("σ, exact", &[standardized.singular_values().max()], &[score(&sigmas, "exact")], F64);
    let x = standardized / sigma;
    let golden = case.matrix("ees/X_normalised_by_corr_sigma");
    case.near("X", x.as_slice(), golden.as_slice(), F64);
    case.near("C", (x.transpose() * &x).as_slice(), case.matrix("ees/C").as_slice(), F64);

    let mut eigenvalues = (x.transpose() * &x).symmetric_eigenvalues().as_slice().to_vec();
    let mut golden = case.values("ees/eigvals_C").to_vec();
    eigenvalues.sort_by(f64::total_cmp);
    golden.sort_by(f64::total_cmp);
    case.near("eigenvalues of C", &eigenvalues, &golden, F64);

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
        ("sum as published", dot(&official, &d[1..]), "own_sum_official_parts(efficient c_m, stored Z, m=1..M)"),
        ("dual sum", dot(&dual, &d), "own_paper_dual_basis(stored Z, m=0..M)"),
        ("dual sum, exact", dot(&dual, &d_exact), "own_paper_dual_basis(exact trace, m=0..M)"),
    ] {
        case.near(what, &[got], &[score(says, want)], F64);
    }
    // The other of the authors' two files has 1/π and 200 probes. With scipy's coefficients, whose errors (1e-11 each)
    // count here: terms of both signs nearly cancel.
    let many = ees::moments(&x, &case.matrix("ees/Z_corr_200"), terms, false);
    let want = score(says, "official_corr_compute_eigenscore(limit=M, Nz=200, 1/pi)");
    case.near("corr.py", &[dot(case.values("ees/c_m_official_efficient_1..M"), &many[1..]) / 2.0], &[want], F64);

    let alphas =
        case.0.tensors.keys().filter_map(|key| key.strip_prefix("ees/shifted_c_m_alpha")?.strip_suffix("_0..M"));
    for name in alphas.map(str::to_owned).collect::<Vec<_>>() {
        let alpha: f64 = name.parse().unwrap();
        let scores = says.table(&format!("own_shifted_alpha{name}"));
        let c = ees::shifted(terms, alpha);
        let d = ees::moments(&x, &z, terms, true);
        case.near("shifted c_m", &c, case.values(&format!("ees/shifted_c_m_alpha{name}_0..M")), F64);
        case.near("shifted d_m", &d, case.values(&format!("ees/shifted_d_m_storedZ_alpha{name}_0..M")), F64);
        let of = |key: &str| score(&scores, key);
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

fn check_eigenscore(case: &Case, says: &Config) {
    let answers = case.matrix("eigenscore/Z_gen_by_dim");
    let rows: Rows = answers.row_iter().map(|row| row.iter().copied().collect()).collect();
    assert_eq!(matrix(&rows), answers);
    for (kind, name) in [
        (EigenScore::Inside, "inside_paper(J_d, +1e-3 I, mean ln)"),
        (EigenScore::InsideCode, "inside_code(cov/(d-1), +1e-3 I, mean log10)"),
        (EigenScore::Regular, "official_regular_eigenscore(alpha=1e-5)"),
        (EigenScore::Analysis, "send_perturbation_compute_eigenscore(rows=generations, svd, sum ln / n)"),
    ] {
        case.near(name, &[kind.of(&answers)], &[score(says, name)], F64);
    }
}
