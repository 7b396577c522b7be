//! Attention maps in a page: what their colours mean, and which token each row and column is.

use std::fmt::Write;

use polyhead_data::Tokenizer;
use polyhead_experiments::page::{escape, wide};
use polyhead_models::Batch;
use polyhead_training::image::{Grid, Png, ramp};

use crate::head_report::{data_url, embedded};

/// More tokens than these have no labels: nobody could find one among them; chosen by us.
const MOST: usize = 48;
/// Signs of a label, beyond which it is cut; chosen by us.
const LONGEST: usize = 10;
/// Pixels of a row with a label.
const ROW: f64 = 14.0;
/// Pixels of a sign of a label.
const SIGN: f64 = 7.0;

/// The tokens of a row as labels; none where there are too many to be read.
pub fn labels(tokenizer: &Tokenizer, row: &Batch) -> Vec<String> {
    if row.seq > MOST {
        return Vec::new();
    }
    let visible = |sign: char| match sign {
        ' ' => '\u{2423}',
        '\n' => '\u{21b5}',
        '\t' => '\u{21e5}',
        sign if sign.is_control() => '\u{fffd}',
        sign => sign,
    };
    let label = |&id: &u32| {
        let text: String = tokenizer.decode(&[id]).chars().map(visible).collect();
        match text.chars().count() {
            0 => tokenizer.token_text(id),
            count if count > LONGEST => text.chars().take(LONGEST - 1).chain(['\u{2026}']).collect(),
            _ => text,
        }
    };
    row.tokens[..row.seq].iter().map(label).collect()
}

/// What the colours of the maps of a layer mean: a bar from the smallest weight to the largest.
pub fn legend(maps: &[Vec<f32>]) -> String {
    let finite = || maps.iter().flatten().copied().filter(|weight| weight.is_finite());
    let (signed, largest) =
        (finite().any(|weight| weight < 0.0), finite().fold(0.0, |most: f32, weight| most.max(weight.abs())));
    let stops: Vec<String> =
        ramp(signed).iter().map(|[red, green, blue]| format!("#{red:02x}{green:02x}{blue:02x}")).collect();
    let least = if signed { format!("\u{2212}{largest:.2}") } else { "0".into() };
    format!(
        "<p class=\"ramp\"><span>{least}</span><i style=\"background:linear-gradient(90deg,{})\"></i><span>{largest:.2}</span></p>",
        stops.join(",")
    )
}

/// The maps of some heads of a layer, with the head's number in the corner of each, where no key is before a query, and a label for each
/// row on the left and for each column on top; all of that where there are labels.
pub fn labelled(png: &Png, heads: &[usize], labels: &[String], about: &str) -> String {
    if labels.is_empty() {
        return embedded(png, about);
    }
    let (count, maps) = (labels.len(), heads.len());
    let grid = Grid::of(maps, count);
    let (zoom, down) = (ROW / grid.scale as f64, maps.div_ceil(grid.across));
    let margin = 8.0 + SIGN * labels.iter().map(|label| label.chars().count()).max().unwrap_or(0) as f64;
    let [width, height] = [png.width, png.height].map(|pixels| margin + zoom * f64::from(pixels));
    let mut svg = format!(
        "<svg role=\"img\" aria-label=\"{about}\" viewBox=\"0 0 {width} {height}\" style=\"width:{width}px\" font-size=\"11\" \
         fill=\"currentColor\"><image x=\"{margin}\" y=\"{margin}\" width=\"{}\" height=\"{}\" href=\"{}\" \
         style=\"image-rendering:pixelated\"/>",
        width - margin,
        height - margin,
        data_url(png)
    );
    let before = margin - 4.0;
    for (at, label) in labels.iter().enumerate() {
        let label = escape(label);
        let place = |map: usize| margin + zoom * grid.middle(map, at, count);
        for y in (0..down).map(place) {
            let _ = write!(svg, "<text x=\"{before}\" y=\"{y:.1}\" dy=\".35em\" text-anchor=\"end\">{label}</text>");
        }
        for x in (0..grid.across).map(place) {
            let _ =
                write!(svg, "<text transform=\"translate({x:.1} {before}) rotate(-90)\" dy=\".35em\">{label}</text>");
        }
    }
    for (at, head) in heads.iter().enumerate() {
        let end = |map: usize, cell: usize| margin + zoom * grid.middle(map, cell, count);
        let (x, y) = (end(at % grid.across, count - 1), end(at / grid.across, 0));
        // On white, whatever the page's colours.
        let _ = write!(
            svg,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" dy=\".5em\" text-anchor=\"end\" fill=\"#1c2024\">head {head}</text>"
        );
    }
    wide(&(svg + "</svg>"))
}
