//! `report.html`: the report as one file that needs nothing else, neither network nor scripts.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use crate::page::{escape, figure, page, table};
use crate::report::Failure;

use super::figures::{At, Curve, Curves, Dot, Row, curves, dot_plot, legend_mark, scatter};
use super::further;
use super::markdown::{difference_rows, environment, failures, notes, run_head, run_rows, shown_metrics, spread};
use super::outcome::{METRICS, Metric, Outcome, Point, curve};
use super::statistics::Summary;

/// The report.
///
/// # Errors
/// If a figure cannot be drawn.
pub fn report(outcome: &Outcome) -> Result<String, Failure> {
    let mut body =
        format!("<h1>{}</h1>\n<p class=\"finding\">{}</p>\n", escape(&outcome.title), escape(&outcome.finding()));
    for problem in failures(outcome) {
        let _ = writeln!(body, "<p class=\"failed\">{}</p>", escape(&problem));
    }
    body.push_str(&figures(outcome).map_err(|error| Failure::Run(format!("a figure cannot be drawn: {error}")))?);
    let metrics = shown_metrics(outcome);
    let head = ["arm", "n"].map(String::from).into_iter().chain(metrics.iter().map(|metric| metric.label()));
    let rows = outcome.arms.iter().enumerate().map(|(at, arm)| {
        let n = arm.runs.iter().filter(|run| run.end.is_ok()).count();
        let cells = metrics.iter().map(|metric| spread(outcome.summary(at, metric), metric));
        [arm.name.clone(), n.to_string()].into_iter().chain(cells).collect()
    });
    let _ = write!(body, "<h2>All numbers</h2>\n{}", table(&head.collect::<Vec<_>>(), rows.collect()));
    let metric = outcome.comparison.metric.metric();
    let head = ["arm", "mean difference", "95 % interval", "n", "seed by seed"].map(String::from);
    let rows = difference_rows(outcome, metric).into_iter().map(|row| row.to_vec()).collect();
    let base = &outcome.arms[outcome.base].name;
    let _ = write!(body, "<h2>Differences to {}, {}</h2>\n{}", escape(base), metric.label(), table(&head, rows));
    let more = table(&further::head(outcome), further::rows(outcome));
    let _ =
        write!(body, "<h2>Further numbers</h2>\n<details><summary>What runs logged last</summary>{more}</details>\n");
    let runs = table(&run_head(), run_rows(outcome));
    let _ = write!(
        body,
        "<h2>Every run</h2>\n<details><summary>All {} runs</summary>{runs}</details>\n",
        outcome.arms.iter().map(|arm| arm.runs.len()).sum::<usize>()
    );
    body.push_str("<h2>Where and how</h2>\n<ul>\n");
    for line in notes(outcome).into_iter().chain(environment(outcome)) {
        let _ = writeln!(body, "<li>{}</li>", escape(&line));
    }
    let _ = writeln!(body, "</ul>\n<pre>{}</pre>\n<h2>Recipes</h2>", escape(&outcome.command));
    for arm in &outcome.arms {
        let (name, recipe) = (escape(&arm.name), escape(&arm.recipe));
        let _ = writeln!(body, "<details><summary>{name}</summary><pre>{recipe}</pre></details>");
    }
    Ok(page(&outcome.title, &body))
}

fn figures(outcome: &Outcome) -> Result<String, String> {
    let metric = outcome.comparison.metric.metric();
    let mut out = String::from("<ul class=\"legend\">\n");
    for (at, arm) in outcome.arms.iter().enumerate() {
        let _ = writeln!(out, "<li>{}{}</li>", legend_mark(at)?, escape(&arm.name));
    }
    out.push_str("</ul>\n<div class=\"figures\">\n");
    let mut add = |title: &str, small: &str, svg: Option<String>| {
        if let Some(svg) = svg {
            out.push_str(&figure(title, small, &svg));
        }
    };

    let base = &outcome.arms[outcome.base].name;
    let differences = (0..outcome.arms.len()).filter(|&arm| arm != outcome.base).filter_map(|arm| {
        let summary = outcome.difference(arm, outcome.base, metric)?;
        Some(row(outcome, arm, metric, summary, outcome.differences(arm, outcome.base, metric)))
    });
    let differences: Vec<Row> = differences.collect();
    let title = format!("Difference to {base}, {}", metric.label());
    let better =
        if outcome.comparison.metric.grows() { "right of the line is better" } else { "left of the line is better" };
    let small = format!("filled: mean; rings: seeds; bar: 95 % interval; {better}");
    add(&title, &small, dot_plot(&title, &metric.label(), &differences, true)?);

    let rows = (0..outcome.arms.len())
        .filter_map(|arm| Some(row(outcome, arm, metric, outcome.summary(arm, metric)?, outcome.values(arm, metric))));
    let title = format!("At the end: {}", metric.label());
    let small = "filled: mean; rings: seeds; bar: 95 % interval of the mean";
    add(&title, small, dot_plot(&title, &metric.label(), &rows.collect::<Vec<_>>(), false)?);

    // Curves show what validations logged, over all held-out batches.
    let logged = ("validation_loss", "validation loss, nats");
    let second = (metric.key == "accuracy").then_some(("validation_accuracy", "validation accuracy"));
    for (key, y) in second.into_iter().chain([logged]) {
        for (x, over) in [("tokens", tokens as fn(&Point) -> f64), ("seconds of training", seconds)] {
            let mut found = Vec::new();
            for (arm, runs) in outcome.arms.iter().enumerate() {
                let of_run = |history: &[_]| curve(history, runs.tokens_per_step, |line| line[key].as_f64());
                let points = mean_curve(runs.runs.iter().map(|run| of_run(&run.history)), over);
                found.push(Curve { arm, points });
            }
            let title = format!("{} over {x}", capital(y.split(',').next().unwrap_or(y)));
            let cut = key == "validation_loss";
            let figure = Curves { title: &title, x, y, curves: found, cut, size: (560, 340) };
            add(&title, "mean over seeds; band: one standard deviation", curves(&figure)?);
        }
    }

    for x in ["kv_bytes_per_token", "tokens_per_second"] {
        let Some(other) = METRICS.iter().find(|metric| metric.key == x) else { continue };
        let dots = (0..outcome.arms.len()).filter_map(|arm| {
            let (x, y) = (outcome.summary(arm, other)?, outcome.summary(arm, metric)?);
            let spread = y.deviation.unwrap_or(0.0) * metric.factor;
            let at = At { x: x.mean * other.factor, y: y.mean * metric.factor, spread };
            Some(Dot { arm, name: outcome.arms[arm].name.clone(), at })
        });
        let title = format!("{} against {}", capital(&metric.title), other.title);
        let svg = scatter(&title, &other.label(), &metric.label(), &dots.collect::<Vec<_>>())?;
        add(&title, "mean over seeds; bar: one standard deviation", svg);
    }
    out.push_str("</div>\n");
    out.push_str(&observations(outcome)?);
    Ok(out)
}

fn row(outcome: &Outcome, arm: usize, metric: &Metric, summary: Summary, values: Vec<(u64, f64)>) -> Row {
    Row {
        arm,
        name: outcome.arms[arm].name.clone(),
        values: values.into_iter().map(|(_, value)| value * metric.factor).collect(),
        mean: summary.mean * metric.factor,
        margin: summary.margin.map(|margin| margin * metric.factor),
    }
}

fn tokens(point: &Point) -> f64 {
    point.tokens
}

fn seconds(point: &Point) -> f64 {
    point.seconds
}

/// The mean over runs at each number of tokens that a run logged.
fn mean_curve(runs: impl Iterator<Item = Vec<Point>>, x: fn(&Point) -> f64) -> Vec<At> {
    let mut by_tokens: BTreeMap<u64, Vec<(f64, f64)>> = BTreeMap::new();
    for point in runs.flatten() {
        by_tokens.entry(point.tokens as u64).or_default().push((x(&point), point.value));
    }
    let mean = |points: Vec<(f64, f64)>| {
        let (xs, ys): (Vec<f64>, Vec<f64>) = points.into_iter().unzip();
        let (x, y) = (Summary::of(&xs)?, Summary::of(&ys)?);
        Some(At { x: x.mean, y: y.mean, spread: y.deviation.unwrap_or(0.0) })
    };
    by_tokens.into_values().filter_map(mean).collect()
}

/// What runs logged besides, a small figure each: what mechanisms tell about themselves, then the rest.
fn observations(outcome: &Outcome) -> Result<String, String> {
    let logs = outcome.arms.iter().flat_map(|arm| &arm.runs).map(|run| &run.history);
    let names: BTreeSet<String> = logs.flat_map(|history| further::names(history)).collect();
    let (mechanisms, others): (Vec<_>, Vec<_>) =
        names.into_iter().partition(|name| name.starts_with(further::MECHANISM));
    let mut out = String::new();
    for (names, heading, small) in [
        (mechanisms, "What the mechanisms do", "Observed on a held-out row; means over heads, layers and seeds."),
        (others, "What else was logged", "Means over seeds."),
    ] {
        if names.is_empty() {
            continue;
        }
        let _ = writeln!(
            out,
            "<h2>{heading}</h2>\n<p class=\"quiet\">{small} Horizontal: tokens.</p>\n<div class=\"figures small\">"
        );
        for name in names {
            let mut found = Vec::new();
            for (arm, runs) in outcome.arms.iter().enumerate() {
                let of_run = |history: &[_]| curve(history, runs.tokens_per_step, |line| further::value(line, &name));
                let points = mean_curve(runs.runs.iter().map(|run| of_run(&run.history)), tokens);
                if !points.is_empty() {
                    found.push(Curve { arm, points });
                }
            }
            let title = capital(&name.trim_start_matches(further::MECHANISM).replace('_', " "));
            let plot = Curves { title: &title, x: "", y: "", curves: found, cut: false, size: (340, 220) };
            if let Some(svg) = curves(&plot)? {
                out.push_str(&figure(&title, "", &svg));
            }
        }
        out.push_str("</div>\n");
    }
    Ok(out)
}

fn capital(words: &str) -> String {
    let mut signs = words.chars();
    signs.next().map_or(String::new(), |first| first.to_uppercase().chain(signs).collect())
}
