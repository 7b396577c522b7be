//! Numbers of heads as a person reads them: a table on standard output, a page with a map of layers and heads, and JSON.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use polyhead_evaluation::head_sets::HeadOf;
use polyhead_experiments::page::{escape, figure, page, table};
use polyhead_runs::Failure;
use polyhead_training::image::{Options, Png, heat_map};
use polyhead_training::run_folder::atomic_write;
use serde_json::{Map, Value, json};

use crate::console::{put, talk, wants_json};

/// Heads in a table.
pub struct Report {
    /// What it is about.
    pub title: String,
    /// What there is to see, in words.
    pub finding: String,
    /// What the columns mean.
    pub about: String,
    /// The heads, a row each.
    pub heads: Vec<HeadOf>,
    /// Their numbers by name, as many as there are heads; `None` where there is none.
    pub columns: Vec<(&'static str, Vec<Option<f64>>)>,
    /// What else is in the JSON.
    pub more: Map<String, Value>,
    /// Further parts of the page.
    pub body: String,
}

impl Report {
    /// Writes `<name>.json` and `<name>.html`, and prints the table.
    ///
    /// # Errors
    /// If something cannot be drawn or written.
    pub fn write(&self, out: &Path, name: &str) -> Result<(), Failure> {
        let json_path = out.join(format!("{name}.json"));
        let json = self.json();
        atomic_write(&json_path, format!("{json:#}\n").as_bytes())?;
        let page_path = out.join(format!("{name}.html"));
        atomic_write(&page_path, page(&self.title, &self.html()?).as_bytes())?;
        match wants_json() {
            true => put!("{json:#}")?,
            false => {
                put!("{}", line(&self.head()))?;
                (0..self.heads.len()).try_for_each(|at| put!("{}", line(&self.cells(at))))?;
            }
        }
        talk!("\n{}", self.finding);
        talk!("numbers and page: {}, {}", json_path.display(), page_path.display());
        Ok(())
    }

    fn json(&self) -> Value {
        let of = |(at, &(layer, head)): (usize, &HeadOf)| {
            let mut row = json!({ "layer": layer, "head": head });
            self.columns.iter().for_each(|(name, values)| row[*name] = json!(values[at]));
            row
        };
        let mut all = self.more.clone();
        all.insert("heads".into(), self.heads.iter().enumerate().map(of).collect());
        Value::Object(all)
    }

    fn html(&self) -> Result<String, Failure> {
        let mut body =
            format!("<h1>{}</h1>\n<p class=\"finding\">{}</p>\n", escape(&self.title), escape(&self.finding));
        body.push_str("<div class=\"figures small\">\n");
        for (name, values) in self.columns.iter().filter(|(_, values)| values.iter().any(Option::is_some)) {
            body.push_str(&overview(&self.heads, name, values)?);
        }
        body.push_str(&format!("</div>\n{}<h2>Heads</h2>\n", self.body));
        body.push_str(&table(&self.head(), (0..self.heads.len()).map(|at| self.cells(at)).collect()));
        body.push_str(&format!("<p class=\"quiet\">{}</p>\n", escape(&self.about)));
        Ok(body)
    }

    fn head(&self) -> Vec<String> {
        ["layer", "head"].into_iter().chain(self.columns.iter().map(|(name, _)| *name)).map(String::from).collect()
    }

    fn cells(&self, at: usize) -> Vec<String> {
        let (layer, head) = self.heads[at];
        let numbers = self.columns.iter().map(|(_, values)| number(values[at]));
        [layer.to_string(), head.to_string()].into_iter().chain(numbers).collect()
    }
}

/// A number of every head as a figure: layers from top to bottom, heads from left to right; where there is no number it is grey.
pub fn overview(heads: &[HeadOf], name: &str, values: &[Option<f64>]) -> Result<String, Failure> {
    let size = |of: fn(&HeadOf) -> usize| heads.iter().map(of).max().map_or(0, |most| most + 1);
    let (layers, across) = (size(|head| head.0), size(|head| head.1));
    let mut cells = vec![f32::NAN; layers * across];
    for (&(layer, head), value) in heads.iter().zip(values) {
        cells[layer * across + head] = value.map_or(f32::NAN, |value| value as f32);
    }
    let known = || values.iter().flatten().copied().filter(|value| value.is_finite());
    let [low, high] = [known().fold(f64::INFINITY, f64::min), known().fold(f64::NEG_INFINITY, f64::max)];
    let range = match known().next() {
        None => (0.0, 1.0),
        Some(only) if low == high => (only as f32 - 1.0, only as f32 + 1.0),
        Some(_) => (low as f32, high as f32),
    };
    let scale = (288 / layers.max(across).max(1)).clamp(2, 24) as u32;
    let png = heat_map(&cells, layers, across, &Options { scale, range: Some(range) });
    let png = png.map_err(|error| Failure::Run(error.to_string()))?;
    let small = format!("layers down, heads across; dark {}, bright {}", number(Some(low)), number(Some(high)));
    Ok(figure(name, &small, &embedded(&png, &format!("{name} of every head"))))
}

/// A number with four significant digits.
pub fn number(value: Option<f64>) -> String {
    match value {
        Some(value) if !value.is_finite() => "–".into(),
        None => "–".into(),
        Some(0.0) => "0".into(),
        Some(value) if value.abs() < 1e-3 || value.abs() >= 1e5 => format!("{value:.2e}"),
        Some(value) => format!("{value:.4}"),
    }
}

fn line(cells: &[String]) -> String {
    let width = |at: usize| if at < 2 { 5 } else { 14 };
    cells.iter().enumerate().map(|(at, cell)| format!("{cell:>0$}", width(at))).collect::<Vec<_>>().join(" ")
}

/// The head with the largest number by size, with it.
pub fn most(heads: &[HeadOf], values: &[Option<f64>]) -> Option<(HeadOf, f64)> {
    let known = heads.iter().zip(values).filter_map(|(&head, value)| Some((head, (*value)?)));
    known.max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()))
}

/// An image inside a page.
pub fn embedded(png: &Png, about: &str) -> String {
    let Png { width, height, .. } = png;
    format!("<img alt=\"{about}\" width=\"{width}\" height=\"{height}\" src=\"{}\">", data_url(png))
}

/// The image as an address of its own.
pub fn data_url(png: &Png) -> String {
    format!("data:image/png;base64,{}", STANDARD.encode(&png.bytes))
}
