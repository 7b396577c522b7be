//! Folders of pictures: one folder a class.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use polyhead_models::InputShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Found;
use super::decode::{Picture, decode};
use super::pictures::Pictures;
use crate::DataError;
use crate::error::At;
use crate::files::{LeftOut, OnBadFile, Search, read_file, search};
use crate::synthetic::Problem;

const ENDINGS: [&str; 10] = ["png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "tif", "tiff", "bmp"];
/// What red, green and blue add to brightness (ITU-R BT.601).
const BRIGHTNESS: [f32; 3] = [0.299, 0.587, 0.114];

/// `[data.image_folder]`: pictures in folders that are named for their classes: PNG, JPEG, WebP, GIF, TIFF and BMP of any kind, the
/// way up that their EXIF data says; what is transparent is laid on black, of several frames or pages the first is taken. Every
/// picture is brought to one size: as small as it may be to cover it, cut to its middle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageFolderConfig {
    /// The folder with a folder for each class.
    pub path: PathBuf,
    /// Such a folder to validate on. Default: a share of the others, validation.fraction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_path: Option<PathBuf>,
    /// Height and width that pictures are brought to.
    pub size: [usize; 2],
    /// 3 (default) for colours, 1 for grey.
    #[serde(default = "three")]
    pub channels: usize,
    /// What is done with a picture that is damaged, cut off or of an unknown kind: "error" (default), or "skip", which counts
    /// and names what it leaves out.
    #[serde(default, skip_serializing_if = "OnBadFile::is_default")]
    pub on_bad_file: OnBadFile,
}

fn three() -> usize {
    3
}

impl ImageFolderConfig {
    /// Checks the settings without touching a file.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self) -> Result<(), Problem> {
        if self.size.iter().any(|side| !(1..=4096).contains(side)) {
            return Err(("size", format!("size ({:?}) must be height and width, each from 1 to 4096", self.size)));
        }
        match self.channels {
            1 | 3 => Ok(()),
            other => Err(("channels", format!("channels ({other}) must be 3 for colours or 1 for grey"))),
        }
    }

    pub(super) fn read(&self) -> Result<Found, DataError> {
        let mut told = Told::default();
        let learned = self.pictures(&self.path, None, &mut told)?;
        let held_out = self
            .validation_path
            .as_ref()
            .map(|path| self.pictures(path, Some(&learned.classes), &mut told))
            .transpose()?;
        Ok(Found { learned, held_out, notes: told.notes() })
    }

    fn pictures(&self, folder: &Path, known: Option<&[String]>, told: &mut Told) -> Result<Pictures, DataError> {
        let [height, width] = self.size;
        let (mut pixels, mut labels) = (Vec::new(), Vec::new());
        let ClassFiles { classes, files, left_out } = class_files(folder, &ENDINGS, known)?;
        told.left_out.extend(left_out);
        for (path, label) in files {
            match decode(&read_file(&path)?) {
                Ok(picture) => {
                    told.turned += usize::from(picture.turned);
                    told.of_several += usize::from(picture.first_of_several);
                    pixels.extend(fitted(&picture, height, width, self.channels));
                    labels.push(label);
                }
                Err(problem) if self.on_bad_file == OnBadFile::Skip => {
                    told.left_out.add(&format!("that could not be read: {problem}"), &path);
                }
                Err(problem) => {
                    let way_out = "replace it, or set data.image_folder.on_bad_file = \"skip\"";
                    return Err(DataError::Unusable(format!("{}: {problem}; {way_out}", path.display())));
                }
            }
        }
        if labels.is_empty() {
            let left_out = told.left_out.note().unwrap_or_default();
            return Err(DataError::Unusable(format!("{}: no picture can be read; {left_out}", folder.display())));
        }
        Ok(Pictures { shape: InputShape::Images { channels: self.channels, height, width }, pixels, labels, classes })
    }
}

/// What there is to tell about the pictures.
#[derive(Default)]
struct Told {
    left_out: LeftOut,
    turned: usize,
    of_several: usize,
}

impl Told {
    fn notes(&self) -> Vec<String> {
        let mut notes: Vec<String> = self.left_out.note().into_iter().collect();
        for (count, what) in [
            (self.turned, "pictures were turned the way up that their EXIF orientation says"),
            (self.of_several, "files hold several frames or pages, of which the first is learned"),
        ] {
            if count > 0 {
                notes.push(format!("{count} {what}"));
            }
        }
        notes
    }
}

/// Classes and their files.
pub(super) struct ClassFiles {
    /// Their names.
    pub(super) classes: Vec<String>,
    /// Files with the class of each.
    pub(super) files: Vec<(PathBuf, u32)>,
    /// What is not read.
    pub(super) left_out: LeftOut,
}

/// Classes with their files: the folders inside of a folder, sorted by name.
///
/// # Errors
/// If there are fewer than two, one holds no such file, or one is not `known`, where they are known.
pub(super) fn class_files(folder: &Path, endings: &[&str], known: Option<&[String]>) -> Result<ClassFiles, DataError> {
    let unusable = |problem: String| DataError::Unusable(format!("{}: {problem}", folder.display()));
    let (mut names, mut left_out) = (BTreeSet::new(), LeftOut::default());
    for entry in std::fs::read_dir(folder).at(folder)? {
        let path = entry.at(folder)?.path();
        let name = path.file_name().unwrap_or_default();
        if name.to_string_lossy().starts_with('.') {
            left_out.add("hidden", &path);
        } else if !path.is_dir() {
            left_out.add("in no folder of a class", &path);
        } else if let Some(name) = name.to_str() {
            names.insert(name.to_owned());
        } else {
            return Err(unusable(format!("the folder {name:?} has a name that is not UTF-8: rename it")));
        }
    }
    let found = || names.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
    let classes = match known {
        Some(known) => known.to_vec(),
        None if names.len() < 2 => {
            return Err(unusable(format!(
                "holds {} folders, and each is a class: two are needed (found: {})",
                names.len(),
                if names.is_empty() { "none".into() } else { found() }
            )));
        }
        None => names.iter().cloned().collect(),
    };
    let mut files = Vec::new();
    for name in names {
        let label = classes.iter().position(|class| *class == name);
        let label = label.ok_or_else(|| unusable(format!("class `{name}` is not among those learned")))?;
        let inside = search(&[folder.join(&name).display().to_string()], endings)?;
        let Search { files: more, left_out: besides } = inside;
        files.extend(more.into_keys().map(|path| (path, label as u32)));
        left_out.extend(besides);
    }
    Ok(ClassFiles { classes, files, left_out })
}

/// `[channels, height, width]`: the middle of the picture, each pixel the mean of what it covers.
fn fitted(picture: &Picture, height: usize, width: usize, channels: usize) -> Vec<u8> {
    let scale = (picture.height as f64 / height as f64).min(picture.width as f64 / width as f64);
    let first = |all: usize, shown: usize| (all as f64 - shown as f64 * scale) / 2.0;
    let (top, left) = (first(picture.height, height), first(picture.width, width));
    let mut planes = vec![0; channels * height * width];
    for y in 0..height {
        let rows = covered(top + y as f64 * scale, scale, picture.height);
        for x in 0..width {
            let columns = covered(left + x as f64 * scale, scale, picture.width);
            let mut sums = [0f64; 3];
            let mut weight = 0.0;
            for &(row, down) in &rows {
                for &(column, across) in &columns {
                    let at = 3 * (row * picture.width + column);
                    weight += down * across;
                    for (sum, &byte) in sums.iter_mut().zip(&picture.pixels[at..at + 3]) {
                        *sum += down * across * f64::from(byte);
                    }
                }
            }
            let means = sums.map(|sum| (sum / weight) as f32);
            let brightness: f32 = means.iter().zip(BRIGHTNESS).map(|(mean, part)| mean * part).sum();
            for channel in 0..channels {
                let value = if channels == 1 { brightness } else { means[channel] };
                planes[(channel * height + y) * width + x] = value.round() as u8;
            }
        }
    }
    planes
}

/// The pixels from `start` on that an interval covers, each with how much of it.
fn covered(start: f64, length: f64, all: usize) -> Vec<(usize, f64)> {
    let end = (start + length).min(all as f64);
    let start = start.max(0.0);
    let pixels = start as usize..(end.ceil() as usize).min(all);
    pixels.map(|pixel| (pixel, end.min(pixel as f64 + 1.0) - start.max(pixel as f64))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_brought_to_one_size_by_means() {
        // 2 x 4: the middle 2 x 2, halved to one pixel.
        let row = |bytes: [u8; 4]| bytes.into_iter().flat_map(|byte| [byte, 0, 255]);
        let pixels = row([9, 10, 20, 9]).chain(row([9, 30, 40, 9])).collect();
        let picture = Picture { height: 2, width: 4, pixels, turned: false, first_of_several: false };
        let fitted = |height, width, channels| fitted(&picture, height, width, channels);
        assert_eq!(fitted(1, 1, 3), [25, 0, 255]);
        assert_eq!(fitted(1, 1, 1), [(25.0 * 0.299f32 + 255.0 * 0.114).round() as u8]);
        // Enlarged, every pixel is four.
        let large = fitted(4, 8, 3);
        assert_eq!(&large[..8], [9, 9, 10, 10, 20, 20, 9, 9]);
        assert_eq!(large[8..16], large[..8]);
        assert_eq!(fitted(2, 4, 3)[..4], [9, 10, 20, 9]);
    }
}
