//! `report.html`: the report as one file that needs nothing else, neither network nor scripts.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::ops::Range;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::page::{escape, figure, page, table, wide};
use polyhead_runs::Failure;
use polyhead_training::run_folder::files::IMAGES;

use super::best_of::BestOf;
use super::extra_metrics;
use super::figures::{At, Curve, Curves, Dot, Drawn, Row, SMALL, WIDE, curves, dot_plot, legend_mark, scatter};
use super::ladder::ArmLadder;
use super::metric::Metric;
use super::notes::{environment, failures, notes};
use super::outcome::{ArmOutcome, Outcome, Point, curve};
use super::statistics::Summary;
use super::tables::{Table, tables};
use super::tune::Values;

/// The report.
///
/// # Errors
/// If a figure cannot be drawn.
pub fn report(outcome: &Outcome) -> Result<String, Failure> {
    let mut body = format!("<h1>{}</h1>\n", escape(&outcome.title));
    for sentence in outcome.finding().lines() {
        let _ = writeln!(body, "<p class=\"finding\">{}</p>", escape(sentence));
    }
    for problem in failures(outcome) {
        let _ = writeln!(body, "<p class=\"failed\">{}</p>", escape(&problem));
    }
    for warning in outcome.warnings() {
        let _ = writeln!(body, "<p class=\"warning\">{}</p>", escape(&warning));
    }
    body.push_str(&figures(outcome).map_err(|error| Failure::Run(format!("a figure cannot be drawn: {error}")))?);
    for Table { title, folded, head, rows } in tables(outcome) {
        let (title, table) = (escape(&title), table(&head, rows));
        let _ = match folded {
            None => writeln!(body, "<h2>{title}</h2>\n{table}"),
            Some(what) => {
                writeln!(body, "<h2>{title}</h2>\n<details><summary>{}</summary>{table}</details>", escape(&what))
            }
        };
    }
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
    let groups = outcome.comparison.groups();
    let mut out = String::from("<ul class=\"legend\">\n");
    for arm in groups.first().into_iter().flat_map(|(_, group)| group.clone()) {
        let _ = writeln!(out, "<li>{}{}</li>", legend_mark(arm)?, escape(outcome.comparison.plain_name(arm)));
    }
    out.push_str("</ul>\n");
    out.push_str(&ladder(outcome)?);
    out.push_str(&over_settings(outcome)?);
    for (setting, group) in groups {
        if let Some(setting) = setting {
            let _ = writeln!(out, "<h2>{}</h2>", escape(&capital(setting)));
        }
        out.push_str(&figures_of(outcome, group)?);
    }
    Ok(out)
}

/// The metric at every setting, a line for each arm.
fn over_settings(outcome: &Outcome) -> Result<String, String> {
    let metric = outcome.comparison.metric.metric();
    let groups = outcome.comparison.groups();
    let names: Vec<&str> = groups.iter().filter_map(|(name, _)| *name).collect();
    if names.len() < 2 {
        return Ok(String::new());
    }
    let curve = |arm: usize| {
        let at = |(at, (_, group)): (usize, &(Option<&str>, Range<usize>))| {
            let summary = outcome.summary(group.start + arm, metric)?;
            let spread = summary.deviation.unwrap_or(0.0) * metric.factor;
            Some(At::around(at as f64, summary.mean * metric.factor, spread))
        };
        Curve::joined(arm, groups.iter().enumerate().filter_map(at).collect())
    };
    let title = format!("{} at every setting", capital(&metric.title));
    let found = (0..groups[0].1.len()).map(curve).collect();
    let y = metric.label();
    let plot = Curves { names: &names, size: WIDE, ..Curves::of(&title, "", &y, found) };
    let svg = curves(&plot)?.map(|svg| figure(&title, "mean over seeds; band: one standard deviation", &full(&svg)));
    Ok(format!("<div class=\"figures\">{}</div>\n", svg.unwrap_or_default()))
}

/// A figure of the whole width, which never becomes so small that its text cannot be read.
fn full(svg: &str) -> String {
    wide(&svg.replacen("<svg", &format!("<svg style=\"min-width:{}px\"", WIDE.0 * 9 / 10), 1))
}

/// The figures of the arms of a setting.
fn figures_of(outcome: &Outcome, group: Range<usize>) -> Result<String, String> {
    let metric = outcome.comparison.metric.metric();
    let mut out = String::from("<div class=\"figures\">\n");
    let mut add = |title: &str, small: &str, svg: Option<String>| {
        out.extend(svg.map(|svg| figure(title, small, &svg)));
    };

    let differences = outcome.pairs(group.clone()).filter_map(|(arm, base)| {
        let summary = outcome.difference(arm, base, metric)?;
        Some(row(outcome, arm, metric, summary, outcome.differences(arm, base, metric)))
    });
    let differences: Vec<Row> = differences.collect();
    let title = format!("Difference to {}, {}", outcome.comparison.base_in_words(), metric.label());
    let better =
        if outcome.comparison.metric.grows() { "right of the line is better" } else { "left of the line is better" };
    let small = format!("filled: mean; rings: seeds; bar: 95 % interval; {better}");
    add(&title, &small, dot_plot(&title, &metric.label(), &differences, true)?);

    let rows = group
        .clone()
        .filter_map(|arm| Some(row(outcome, arm, metric, outcome.summary(arm, metric)?, outcome.values(arm, metric))));
    let title = format!("At the end: {}", metric.label());
    let small = "filled: mean; rings: seeds; bar: 95 % interval of the mean";
    add(&title, small, dot_plot(&title, &metric.label(), &rows.collect::<Vec<_>>(), false)?);

    // Curves show what validations logged, over all held-out batches.
    let logged = ("validation_loss", "validation loss, nats");
    let second = (metric.key == "accuracy").then_some(("validation_accuracy", "validation accuracy"));
    for (key, y) in second.into_iter().chain([logged]) {
        let units = outcome.in_units("tokens");
        for (x, over) in [(units.as_str(), tokens as fn(&Point) -> f64), ("seconds of training", seconds)] {
            let found = curves_of(outcome, group.clone(), over, |line| line[key].as_f64());
            let title = format!("{} over {x}", capital(y.split(',').next().unwrap_or(y)));
            let plot = Curves { cut: key == "validation_loss", ..Curves::of(&title, x, y, found) };
            add(&title, "mean over seeds; band: one standard deviation", curves(&plot)?);
        }
    }

    if let Some((key, found)) = over_choices(outcome, group.clone()) {
        let title = format!("{} over {key}", capital(&metric.title));
        let y = metric.label();
        let plot = Curves { logarithms: true, ..Curves::of(&title, &key, &y, found) };
        add(&title, "on the half that chooses; both axes are logarithmic", curves(&plot)?);
    }

    if outcome.comparison.chooses() {
        let title = format!("Expected best of so many trials: {}", metric.label());
        let small = "on the reporting half; band: 95 % interval of the bootstrap over trials";
        let found = group.clone().map(|arm| best_of(outcome, arm)).collect();
        add(&title, small, curves(&Curves::of(&title, "trials", &metric.label(), found))?);
    }

    for x in ["kv_bytes_per_token", "tokens_per_second"] {
        let Some(other) = outcome.metrics().into_iter().find(|metric| metric.key == x) else { continue };
        let dots = group.clone().filter_map(|arm| {
            let (x, y) = (outcome.summary(arm, &other)?, outcome.summary(arm, metric)?);
            let spread = y.deviation.unwrap_or(0.0) * metric.factor;
            let at = At::around(x.mean * other.factor, y.mean * metric.factor, spread);
            Some(Dot { arm: colour_of(outcome, arm), name: outcome.comparison.plain_name(arm).to_owned(), at })
        });
        let title = format!("{} against {}", capital(&metric.title), other.title);
        let svg = scatter(&title, &other.label(), &metric.label(), &dots.collect::<Vec<_>>())?;
        add(&title, "mean over seeds; bar: one standard deviation", svg);
    }
    out.push_str("</div>\n");
    out.push_str(&images(outcome, group.clone()));
    out.push_str(&observations(outcome, group)?);
    Ok(out)
}

/// What networks that enlarge images make of some of them, by the first finished run of each arm.
fn images(outcome: &Outcome, group: Range<usize>) -> String {
    const ROWS: &str = "each row: enlarged by a bicubic filter, by the network, and the image itself";
    let figure_of = |arm: &ArmOutcome| {
        let run = arm.runs.iter().find(|run| run.end.is_ok())?;
        let bytes = std::fs::read(run.folder.join(IMAGES)).ok()?;
        let (name, coded) = (escape(&arm.name), STANDARD.encode(bytes));
        let image = format!("<img alt=\"images of {name}\" src=\"data:image/png;base64,{coded}\">");
        Some(figure(&arm.name, ROWS, &image))
    };
    let figures: String = outcome.arms[group].iter().filter_map(figure_of).collect();
    match figures.is_empty() {
        true => figures,
        false => format!("<h2>Images</h2>\n<div class=\"figures\">{figures}</div>\n"),
    }
}

/// An arm has the same colour at every setting.
fn colour_of(outcome: &Outcome, arm: usize) -> usize {
    outcome.comparison.arm[arm].place.arm
}

/// What arms reached with each value of the one key that was tried, where that is a positive number.
fn over_choices(outcome: &Outcome, group: Range<usize>) -> Option<(String, Vec<Curve>)> {
    let number = |values: &Values| match values.as_slice() {
        [(_, value)] => value.as_float().or(value.as_integer().map(|value| value as f64)).filter(|value| *value > 0.0),
        _ => None,
    };
    let factor = outcome.comparison.metric.metric().factor;
    let mut key = None;
    let mut found = Vec::new();
    for arm in group {
        let mut points = Vec::new();
        for tried in &outcome.arms[arm].considered {
            key = key.or_else(|| Some(tried.values.first()?.0.clone()));
            let x = number(&tried.values)?;
            points.extend(tried.selection.map(|reached| (x, factor * reached.mean)).filter(|(_, y)| *y > 0.0));
        }
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let at = |(x, y): (f64, f64)| At::around(x.log10(), y.log10(), 0.0);
        found.push(Curve::joined(colour_of(outcome, arm), points.into_iter().map(at).collect()));
    }
    Some((key?, found)).filter(|(_, found)| found.iter().any(|curve| curve.points.len() > 1))
}

/// What an arm would have reached with fewer trials.
fn best_of(outcome: &Outcome, arm: usize) -> Curve {
    let (quality, factor) = (outcome.comparison.metric, outcome.comparison.metric.metric().factor);
    let at = |BestOf { trials, mean, low, high }| At {
        x: trials as f64,
        y: mean * factor,
        low: low * factor,
        high: high * factor,
    };
    let points = outcome.arms[arm].expected_best(quality).into_iter().map(at).collect();
    Curve::joined(colour_of(outcome, arm), points)
}

/// The laws of a ladder over what the arms reached.
fn ladder(outcome: &Outcome) -> Result<String, String> {
    let (found, metric) = (outcome.ladders(), outcome.comparison.metric.metric());
    if found.is_empty() {
        return Ok(String::new());
    }
    let named = if outcome.comparison.metric.grows() { "share of errors".to_owned() } else { metric.label() };
    let mut drawn = Vec::new();
    for ArmLadder { arm, rungs, law } in &found {
        let (arm, point) = (colour_of(outcome, *arm), |x: f64, y: f64| At::around(x.log10(), y.log10(), 0.0));
        let mean = |values: &[f64]| Summary::of(values).map(|summary| summary.mean);
        let points = rungs.iter().filter_map(|(flops, values)| Some(point(*flops, mean(values)?))).collect();
        drawn.push(Curve { drawn: Drawn::Marks, ..Curve::joined(arm, points) });
        let ends = || rungs.iter().map(|(flops, _)| flops.ln());
        let (low, high) = (ends().fold(f64::INFINITY, f64::min), ends().fold(f64::NEG_INFINITY, f64::max));
        if let Ok(law) = law {
            let at = |step: u32| (low + (high - low) * f64::from(step) / 40.0).exp();
            let line = (0..=40).map(at).map(|flops| point(flops, law.at(flops))).collect();
            drawn.push(Curve { drawn: Drawn::Line, ..Curve::joined(arm, line) });
        }
    }
    let title = format!("{} over training FLOPs", capital(&named));
    let plot = Curves { logarithms: true, size: WIDE, ..Curves::of(&title, "training FLOPs", &named, drawn) };
    let small = "marks: mean over seeds of each budget; lines: power laws; both axes are logarithmic";
    let svg = curves(&plot)?.map(|svg| figure(&title, small, &full(&svg))).unwrap_or_default();
    Ok(format!("<h2>Power laws</h2>\n<div class=\"figures\">{svg}</div>\n"))
}

/// A curve of the means over seeds for every arm that logged something.
fn curves_of(
    outcome: &Outcome,
    group: Range<usize>,
    over: fn(&Point) -> f64,
    value: impl Fn(&Value) -> Option<f64> + Copy,
) -> Vec<Curve> {
    let of_arm = |arm: usize| {
        let runs = &outcome.arms[arm];
        let of_run = |history: &[Value]| curve(history, runs.tokens_per_step, value);
        Curve::joined(colour_of(outcome, arm), mean_curve(runs.runs.iter().map(|run| of_run(&run.history)), over))
    };
    group.map(of_arm).filter(|curve| !curve.points.is_empty()).collect()
}

fn row(outcome: &Outcome, arm: usize, metric: &Metric, summary: Summary, values: Vec<(u64, f64)>) -> Row {
    Row {
        arm: colour_of(outcome, arm),
        name: outcome.comparison.plain_name(arm).to_owned(),
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
        Some(At::around(x.mean, y.mean, y.deviation.unwrap_or(0.0)))
    };
    by_tokens.into_values().filter_map(mean).collect()
}

/// What runs logged besides, a small figure each: what mechanisms tell about themselves, then the rest.
fn observations(outcome: &Outcome, group: Range<usize>) -> Result<String, String> {
    let logs = outcome.arms[group.clone()].iter().flat_map(|arm| &arm.runs).map(|run| &run.history);
    let names: BTreeSet<String> = logs.flat_map(|history| extra_metrics::names(history)).collect();
    let (mechanisms, others): (Vec<_>, Vec<_>) =
        names.into_iter().partition(|name| name.starts_with(extra_metrics::MECHANISM));
    let (mut out, units) = (String::new(), outcome.in_units("tokens"));
    for (names, heading, small) in [
        (mechanisms, "What the mechanisms do", "Observed on a held-out row; means over heads, layers and seeds."),
        (others, "What else was logged", "Means over seeds."),
    ] {
        if names.is_empty() {
            continue;
        }
        let _ = writeln!(
            out,
            "<h2>{heading}</h2>\n<p class=\"quiet\">{small} Horizontal: {units}.</p>\n<div class=\"figures small\">"
        );
        for name in names {
            let found = curves_of(outcome, group.clone(), tokens, |line| extra_metrics::value(line, &name));
            let title = capital(&name.trim_start_matches(extra_metrics::MECHANISM).replace('_', " "));
            let plot = Curves { size: SMALL, ..Curves::of(&title, "", "", found) };
            out.extend(curves(&plot)?.map(|svg| figure(&title, "", &svg)));
        }
        out.push_str("</div>\n");
    }
    Ok(out)
}

fn capital(words: &str) -> String {
    let mut signs = words.chars();
    signs.next().map_or(String::new(), |first| first.to_uppercase().chain(signs).collect())
}
