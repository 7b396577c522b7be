//! Comparisons: is one mechanism better than another at the same budget, and by more than chance?
//!
//! In order: the file says what is compared (`comparison.rs`, `tune.rs`), what arms start from is made (`prepare.rs`), every arm
//! gets a recipe of the same cost (`matching.rs`, `calibration.rs`, `plan.rs`), every run is a process of its own (`runs.rs`,
//! `processes.rs`, elsewhere by `launcher.rs`) and so is every task that it is evaluated on (`evaluate.rs`), what they reached is put together (`outcome.rs`,
//! `metric.rs`, `extra_metrics.rs`, `statistics.rs`, `verdict.rs`, `best_of.rs`, `ladder.rs`, `law.rs`) and written for people
//! (`finding.rs`, `notes.rs`, `tables.rs`, `markdown.rs`, `html.rs`, `figures.rs`, `page.rs`), for programs (`json.rs`) and for the replication table
//! (`record.rs`). `simulation.rs` tries on made-up runs what the statistics promise.
//!
//! Tasks that others published, under their settings, are in `suites.rs`; how they are run alone, in `suite_runs.rs`.

mod best_of;
pub mod calibration;
pub mod comparison;
pub mod evaluate;
mod extra_metrics;
mod figures;
mod finding;
pub mod html;
pub mod json;
mod ladder;
pub mod launcher;
mod law;
pub mod markdown;
mod matching;
mod metric;
mod notes;
pub mod outcome;
pub mod page;
pub mod plan;
pub mod prepare;
pub mod processes;
pub mod record;
pub mod runs;
#[cfg(test)]
mod simulation;
pub mod statistics;
pub mod suite_runs;
pub mod suites;
mod tables;
pub mod tune;
mod verdict;
