//! The image of a run: its losses over the steps, as an SVG that any browser shows.

use std::path::Path;

use crate::TrainError;
use crate::run_folder::files;
use crate::run_folder::{atomic_write, read_metrics};
use plotters::prelude::*;

const SIZE: (u32, u32) = (900, 420);
// Two of Okabe and Ito's colours, which everybody can tell apart.
const TRAINING: RGBColor = RGBColor(86, 180, 233);
const VALIDATION: RGBColor = RGBColor(213, 94, 0);

/// Points of a curve: step and loss.
type Points = Vec<(f64, f64)>;

/// Draws `curve.svg` from the run's `metrics.jsonl`. Nothing is drawn before there are two steps.
///
/// # Errors
/// If the log cannot be read or the image cannot be written.
pub(crate) fn draw(run_dir: &Path) -> Result<(), TrainError> {
    let (lines, _) = read_metrics(run_dir)?; // what is damaged was told when the log was opened
    let points = |key: &str| -> Points {
        lines.iter().filter_map(|line| Some((line["step"].as_f64()?, line[key].as_f64()?))).collect()
    };
    let (training, validation) = (points("loss"), points("validation_loss"));
    if training.len() < 2 {
        return Ok(());
    }
    let svg = image(&training, &validation).map_err(TrainError::Curve)?;
    Ok(atomic_write(&run_dir.join(files::CURVE), svg.as_bytes())?)
}

fn image(training: &Points, validation: &Points) -> Result<String, String> {
    let last = training.iter().chain(validation).map(|point| point.0).fold(1.0, f64::max);
    let losses = || training.iter().chain(validation).map(|point| point.1);
    let (lowest, highest) = losses().fold((f64::MAX, f64::MIN), |(low, high), y| (low.min(y), high.max(y)));
    let margin = 0.05 * (highest - lowest).max(1e-3);
    let mut svg = String::new();
    {
        let said = |error: &dyn std::fmt::Display| error.to_string();
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(|e| said(&e))?;
        let mut chart = ChartBuilder::on(&area)
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..last, lowest - margin..highest + margin)
            .map_err(|e| said(&e))?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .axis_desc_style(("sans-serif", 15))
            .label_style(("sans-serif", 13))
            .x_desc("step")
            .y_desc("loss")
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.2}"))
            .draw()
            .map_err(|e| said(&e))?;
        let named = |name: &str, points: &Points| match points.last() {
            Some((_, loss)) => format!("{name}: {loss:.3}"),
            None => name.to_owned(),
        };
        for (name, points, colour, width) in
            [("training", training, TRAINING, 1), ("validation", validation, VALIDATION, 3)]
        {
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(width)))
                .map_err(|e| said(&e))?
                .label(named(name, points))
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], colour.stroke_width(3)));
        }
        // A validation or two make no line: show where they are.
        let dots = validation.iter().map(|&at| Circle::new(at, 4, VALIDATION.filled()));
        chart.draw_series(dots).map_err(|e| said(&e))?;
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .margin(12)
            .label_font(("sans-serif", 15))
            .background_style(WHITE.mix(0.85))
            .draw()
            .map_err(|e| said(&e))?;
        area.present().map_err(|e| said(&e))?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_run_becomes_an_image_and_one_step_none() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("metrics.jsonl");
        std::fs::write(&log, "{\"step\":1,\"loss\":4.5}\n").unwrap();
        draw(dir.path()).unwrap();
        assert!(!dir.path().join("curve.svg").exists());
        let lines = "{\"step\":1,\"loss\":4.5}\n{\"step\":2,\"loss\":null}\n{\"step\":3,\"loss\":3.25}\n\
                     {\"step\":3,\"validation_loss\":3.5}\n{\"half a line";
        std::fs::write(&log, lines).unwrap();
        draw(dir.path()).unwrap();
        let svg = std::fs::read_to_string(dir.path().join("curve.svg")).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("training: 3.250") && svg.contains("validation: 3.500"));
        // All losses equal is no reason to fail.
        std::fs::write(&log, "{\"step\":1,\"loss\":2.0}\n{\"step\":2,\"loss\":2.0}\n").unwrap();
        draw(dir.path()).unwrap();
    }
}
