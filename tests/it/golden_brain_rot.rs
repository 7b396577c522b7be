//! Effect sizes, token-matched mixing and the choice of posts of the brain-rot experiments; see `tests/golden/brain_rot/README.md`.

use polyhead_data::{LastDocument, NumberRule, documents_within, quotas};
use polyhead_experiments::statistics::EffectSize;

use crate::golden::{Golden, compare, files, size};

/// Relative; the inputs are f32.
const STATISTICS: f32 = 1e-5;

#[test]
fn golden_brain_rot() {
    for golden in &files("brain_rot") {
        match golden.config["kind"].as_str().unwrap() {
            "hedges" => check_effect_sizes(golden),
            "mix" => check_mixing(golden),
            other => panic!("{}: kind {other}", golden.name),
        }
    }
}

fn check_effect_sizes(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.is("sign", "x minus y");
    config.is("ddof", 1);
    for case in 0..size(config, "cases") {
        let (x, y) = (file.wide(&format!("x.{case}")), file.wide(&format!("y.{case}")));
        let effect = EffectSize::between(x, y).unwrap();
        let freedom = (x.len() + y.len() - 2) as f64;
        let approximate = 1.0 - 3.0 / (4.0 * freedom - 1.0);
        for (key, got) in [
            ("cohen_d", effect.d),
            ("pooled_sd", effect.pooled_deviation),
            ("j_exact", effect.correction),
            ("g_exact", effect.g()),
            ("se_d", effect.standard_error),
            // What the usual approximation of the correction would give; reports have the exact one.
            ("j_approx", approximate),
            ("g_approx", effect.d * approximate),
        ] {
            let want = &file[key].values;
            assert_eq!(want.len(), size(config, "cases"), "{name}: {key}");
            compare(name, &format!("{key} of case {case}"), &[want[case]], &[got as f32], STATISTICS, true);
        }
    }
}

fn check_mixing(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    config.beside_the_point(&["cap_rule"]);
    let budget = size(config, "budget") as u64;
    let ratios: Vec<f64> = serde_json::from_value(config["ratios"].clone()).unwrap();
    let columns: Vec<&str> = config["columns"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(columns, ["cap_junk", "cap_control", "n_junk", "n_control", "tokens_junk", "tokens_control"]);
    let lengths = |kind: &str| file.wide(&format!("length.{kind}")).iter().map(|&length| length as u64);
    for (rule, key) in [(LastDocument::Overshoot, "while_le"), (LastDocument::LeaveOut, "not_exceed")] {
        let (mut table, mut realised) = (Vec::new(), Vec::new());
        for &ratio in &ratios {
            let caps = quotas(&[ratio, 1.0 - ratio], budget);
            let [junk, control] =
                [documents_within(lengths("junk"), caps[0], rule), documents_within(lengths("control"), caps[1], rule)];
            let [of_junk, of_control] = [&junk, &control].map(|taken| taken.iter().sum::<u64>());
            table.extend(
                [caps[0], caps[1], junk.len() as u64, control.len() as u64, of_junk, of_control].map(|n| n as f64),
            );
            realised.push((of_junk as f64 / (of_junk + of_control) as f64) as f32);
        }
        assert_eq!(file.wide(&format!("table.{key}")), table, "{name}: {key}");
        let want = format!("realised_ratio.{key}");
        compare(name, &want, &file[want.as_str()].values, &realised, STATISTICS, true);
    }
    check_labels(golden);
}

/// Which posts are junk and which are control: rules for numbers of rows.
fn check_labels(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let codes = config.table("label_codes");
    let rule = |above, below| NumberRule { field: String::new(), above, at_least: None, below, at_most: None };
    let popular = rule(Some(500.0), None);
    let at_most = |bound| NumberRule { at_most: Some(bound), ..rule(None, None) };
    let (short, long) = (rule(None, Some(30.0)), rule(Some(100.0), None));
    let posts = || file.wide("m1.likes").iter().zip(file.wide("m1.tokens"));
    let labels = |junk: [&NumberRule; 2], control: [&NumberRule; 2]| -> Vec<f64> {
        let keeps = |rules: [&NumberRule; 2], likes, tokens| rules[0].keeps(likes) && rules[1].keeps(tokens);
        let label = |likes, tokens| match (keeps(junk, likes, tokens), keeps(control, likes, tokens)) {
            (true, _) => codes["junk"].as_f64().unwrap(),
            (_, true) => codes["control"].as_f64().unwrap(),
            _ => codes["dropped"].as_f64().unwrap(),
        };
        posts().map(|(&likes, &tokens)| label(likes, tokens)).collect()
    };
    let paper = labels([&popular, &short], [&at_most(500.0), &long]);
    assert_eq!(paper, file.wide("m1.label_paper"), "{name}: label_paper");
    let script = labels([&popular, &at_most(30.0)], [&popular, &long]);
    assert_eq!(script, file.wide("m1.label_script"), "{name}: label_script");
}
