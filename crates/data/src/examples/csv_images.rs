//! Pictures as rows of a table: pixels, then the class. scikit-learn's digits come like this (`digits.csv.gz`).

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Found;
use super::idx::unpacked;
use super::pictures::Pictures;
use crate::DataError;
use crate::synthetic::Problem;
use crate::text::expand;

/// `[data.csv_images]`: one grey picture a line, its pixels row by row and its class last, separated by commas; packed (.gz)
/// or not. A first line that holds no numbers is a heading.
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
}

fn byte() -> f64 {
    255.0
}

impl CsvImagesConfig {
    /// Checks the settings without touching a file.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self) -> Result<(), Problem> {
        if self.paths.is_empty() {
            return Err(("paths", "paths is empty: name at least one file, folder or pattern".into()));
        }
        if self.size.iter().any(|side| !(1..=4096).contains(side)) {
            return Err(("size", format!("size ({:?}) must be height and width, each from 1 to 4096", self.size)));
        }
        match self.white.is_finite() && self.white > 0.0 {
            true => Ok(()),
            false => Err(("white", format!("white ({}) must be a positive number", self.white))),
        }
    }

    pub(super) fn read(&self) -> Result<Found, DataError> {
        let [height, width] = self.size;
        let (mut pixels, mut labels) = (Vec::new(), Vec::new());
        for path in expand(&self.paths, &["csv", "gz"])?.into_keys() {
            let text = String::from_utf8_lossy(&unpacked(&path)?).into_owned();
            for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
                let wrong = |problem: String| DataError::Row { path: path.clone(), line: index + 1, problem };
                let numbers: Result<Vec<f64>, _> = line.split(',').map(|cell| cell.trim().parse::<f64>()).collect();
                let numbers = match numbers {
                    Ok(numbers) => numbers,
                    Err(_) if index == 0 => continue,
                    Err(error) => return Err(wrong(error.to_string())),
                };
                let (count, expected) = (numbers.len(), height * width + 1);
                let Some((&label, picture)) = numbers.split_last().filter(|_| count == expected) else {
                    return Err(wrong(format!(
                        "{count} numbers; {height} x {width} pixels and a class are {expected}"
                    )));
                };
                if !(label.fract() == 0.0 && (0.0..65536.0).contains(&label)) {
                    return Err(wrong(format!("the last number, {label}, is no class: 0, 1, 2, ...")));
                }
                labels.push(label as u32);
                pixels
                    .extend(picture.iter().map(|&value| (value / self.white * 255.0).round().clamp(0.0, 255.0) as u8));
            }
        }
        let classes = Pictures::numbered(&labels);
        let learnt = Pictures { shape: InputShape::Images { channels: 1, height, width }, pixels, labels, classes };
        Ok(Found { learnt, held_out: None })
    }
}
