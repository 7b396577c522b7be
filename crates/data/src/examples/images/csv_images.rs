//! Images as rows of a table: pixels and a class. scikit-learn's digits come like this (`digits.csv.gz`).

use std::path::Path;

use csv::StringRecord;
use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Images;
use crate::documents::distinct_names;
use crate::files::{Packed, Search, Table, search};
use crate::problem::{Problem, image_size, require, some_path};
use crate::source::Source;
use crate::{Data, DataError, Opening};

/// `[data.csv_images]`: one grey image a row, its pixels from left to right and from top to bottom and its class last or
/// where `label` says; cells separated by commas, semicolons or tabs, quoted or not; packed (.gz, .zst) or not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CsvImagesConfig {
    /// Files, folders and patterns, such as "digits.csv.gz".
    pub paths: Vec<String>,
    /// Height and width, in pixels.
    pub size: [usize; 2],
    /// The brightest value that a pixel can have; the darkest is 0. Default: 255; scikit-learn's digits go to 16.
    #[serde(default = "byte")]
    pub white: f64,
    /// The column of the class: its name in the headings, such as "species", or its place, from 0 on. Default: the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<Column>,
    /// Whether the first row holds headings. Default: found out for each file, and logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headings: Option<bool>,
}

/// A column of a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Column {
    /// Its place, from 0 on.
    Place(usize),
    /// Its name in the headings.
    Name(String),
}

fn byte() -> f64 {
    255.0
}

impl Source for CsvImagesConfig {
    fn validate(&self, _seq_len: usize) -> Result<(), Problem> {
        some_path(&self.paths)?;
        image_size(self.size)?;
        let pixels = self.size[0] * self.size[1];
        match &self.label {
            Some(Column::Place(place)) => require(*place <= pixels, "label", || {
                format!("label ({place}) must be the place of a column, from 0 to {pixels}")
            })?,
            Some(Column::Name(name)) => require(self.headings != Some(false), "label", || {
                format!("label (\"{name}\") is a name: headings must not be false")
            })?,
            None => {}
        }
        let white = self.white;
        require(white.is_finite() && white > 0.0, "white", || format!("white ({white}) must be a positive number"))
    }

    fn paths(&self) -> Vec<String> {
        self.paths.clone()
    }

    fn shape(&self) -> Option<InputShape> {
        Some(InputShape::Images { channels: 1, height: self.size[0], width: self.size[1] })
    }

    fn open(&self, opening: Opening<'_>) -> Result<Data, DataError> {
        let (images, notes) = self.read()?;
        images.open(None, ("rows of pixels", notes, Some("label")), opening)
    }
}

impl CsvImagesConfig {
    /// The images, and what there is to note about them.
    fn read(&self) -> Result<(Images, Vec<String>), DataError> {
        let [height, width] = self.size;
        let Search { files, left_out } = search(&self.paths, &[&["csv", "tsv", "gz"]])?;
        let mut table = Pixels { config: self, pixels: Vec::new(), labels: Vec::new(), headed: Vec::new() };
        for path in files.keys() {
            table.read(path)?;
        }
        let Pixels { pixels, labels, headed, .. } = table;
        if labels.is_empty() {
            let names: Vec<String> = files.keys().map(|path| path.display().to_string()).collect();
            return Err(unusable!("{}: no row but headings", names.join(", ")));
        }
        let (classes, labels) = numbered(labels);
        let mut notes: Vec<String> = left_out.note().into_iter().collect();
        if !headed.is_empty() {
            notes.push(format!("the first row is taken for headings, not for an image, in {}", headed.join(", ")));
        }
        let images = Images { shape: InputShape::Images { channels: 1, height, width }, pixels, labels, classes };
        Ok((images, notes))
    }
}

/// Classes and the class of each row: where all are whole numbers, all from 0 to the largest; otherwise by name.
fn numbered(labels: Vec<String>) -> (Vec<String>, Vec<u32>) {
    if let Some(numbers) = labels.iter().map(|label| class_number(label)).collect::<Option<Vec<u32>>>() {
        return (Images::numbered(&numbers), numbers);
    }
    let classes = distinct_names(labels.iter());
    let places: std::collections::HashMap<&str, u32> = classes.iter().map(String::as_str).zip(0..).collect();
    let labels = labels.iter().map(|label| places[label.as_str()]).collect();
    (classes, labels)
}

/// The number of a class; 3.0 is 3.
fn class_number(cell: &str) -> Option<u32> {
    let number: f64 = cell.parse().ok()?;
    (number.fract() == 0.0 && (0.0..65536.0).contains(&number)).then_some(number as u32)
}

/// Rows as they are read.
struct Pixels<'a> {
    config: &'a CsvImagesConfig,
    pixels: Vec<u8>,
    labels: Vec<String>,
    /// Files whose first row was found to hold headings.
    headed: Vec<String>,
}

impl Pixels<'_> {
    fn read(&mut self, path: &Path) -> Result<(), DataError> {
        let [height, width] = self.config.size;
        let columns = height * width + 1;
        let mut file = Packed::open(path)?;
        if let Some(what) = file.not_text(path)? {
            return Err(unusable!("{} is {what}: a table in UTF-8 is read, packed (.gz, .zst) or not", path.display()));
        }
        let mut settings = csv::ReaderBuilder::new();
        // 64 letters a cell, and some for headings.
        let longest = 64 * columns + 65536;
        let mut table = Table::new(path, file.content, settings.flexible(true).trim(csv::Trim::All), longest);
        let mut next = || -> Result<Option<(usize, StringRecord)>, DataError> {
            match table.next_record()? {
                Some((line, row)) if row.len() != columns => {
                    let problem = format!("{} cells; {height} x {width} pixels and a class are {columns}", row.len());
                    Err(DataError::Row { path: path.to_owned(), line, problem })
                }
                row => Ok(row),
            }
        };
        let Some((line, first)) = next()? else { return Ok(()) };
        let second = next()?;
        let by_name = |name: &String| first.iter().position(|cell| cell == name);
        let place = match &self.config.label {
            None => columns - 1,
            Some(Column::Place(place)) => *place,
            Some(Column::Name(name)) => by_name(name).ok_or_else(|| {
                let there: Vec<&str> = first.iter().take(10).collect();
                let problem =
                    format!("no column is called \"{name}\" (data.csv_images.label); there are {}", there.join(", "));
                DataError::Row { path: path.to_owned(), line, problem }
            })?,
        };
        let named = matches!(self.config.label, Some(Column::Name(_)));
        let headings = self
            .config
            .headings
            .unwrap_or_else(|| named || are_headings(&first, second.as_ref().map(|(_, row)| row), place));
        if headings {
            self.headed.push(path.display().to_string());
        } else {
            self.take(&first, place, (path, line))?;
        }
        let mut row = second;
        while let Some((line, cells)) = row {
            self.take(&cells, place, (path, line))?;
            row = next()?;
        }
        Ok(())
    }

    /// Adds a row.
    fn take(&mut self, row: &StringRecord, place: usize, (path, line): (&Path, usize)) -> Result<(), DataError> {
        let white = self.config.white;
        let wrong = |problem: String| DataError::Row { path: path.to_owned(), line, problem };
        for (column, cell) in row.iter().enumerate() {
            if column == place {
                if cell.is_empty() || cell.parse::<f64>().is_ok() && class_number(cell).is_none() {
                    let way_out = "0, 1, 2, ... or names; data.csv_images.label says which column holds it";
                    return Err(wrong(format!("cell {}, \"{cell}\", is not a class: {way_out}", column + 1)));
                }
                self.labels.push(cell.to_owned());
                continue;
            }
            let value = cell.parse::<f64>().ok().filter(|value| (0.0..=white).contains(value));
            let value = value.ok_or_else(|| {
                let heading =
                    if line == 1 { ", and headings (data.csv_images.headings) are names throughout" } else { "" };
                wrong(format!(
                    "cell {}, \"{cell}\", is not a pixel: a number from 0 to {white} (data.csv_images.white){heading}",
                    column + 1
                ))
            })?;
            self.pixels.push((value / white * 255.0).round() as u8);
        }
        Ok(())
    }
}

/// Whether the first row names columns: no pixel of it is a number, or the pixels are numbered from 0 or 1 on, or its class is no
/// number where that of the next row is.
fn are_headings(first: &StringRecord, second: Option<&StringRecord>, place: usize) -> bool {
    let number = |cell: &str| cell.parse::<f64>().is_ok();
    let pixels = || first.iter().enumerate().filter(|(column, _)| *column != place).map(|(_, cell)| cell);
    if pixels().all(|cell| !number(cell) && !cell.is_empty()) {
        return true;
    }
    let named = !number(&first[place]) && second.is_some_and(|second| number(&second[place]));
    let counted = [0, 1].into_iter().any(|from| (from..).zip(pixels()).all(|(count, cell)| cell == count.to_string()));
    pixels().all(number) && (named || counted && !number(&first[place]))
}

#[cfg(test)]
mod tests;
