//! Images for classifiers, in memory as bytes.

mod cifar;
mod csv_images;
mod idx;
mod image_folder;
mod shapes;

use polyhead_models::InputShape;

use super::Found;
use crate::batches::{Content, Example};
use crate::{Data, DataError, Opening};

pub use cifar::CifarConfig;
pub use csv_images::CsvImagesConfig;
pub use idx::IdxConfig;
pub use image_folder::ImageFolderConfig;
pub use shapes::ShapesConfig;

/// Images of one size with their classes.
struct Images {
    /// Of each.
    shape: InputShape,
    /// `[n, channels, height, width]`
    pixels: Vec<u8>,
    /// The class of each.
    labels: Vec<u32>,
    /// The names of the classes.
    classes: Vec<String>,
}

impl Images {
    /// Adds everything that decides what a model trains on.
    fn hash(&self, hasher: &mut blake3::Hasher) {
        hasher.update(format!("{:?} {:?}", self.shape, self.classes).as_bytes());
        hasher.update(&self.pixels);
        self.labels.iter().for_each(|label| {
            hasher.update(&label.to_le_bytes());
        });
    }

    /// The names of classes that are but numbers.
    fn numbered(labels: &[u32]) -> Vec<String> {
        (0..=labels.iter().copied().max().unwrap_or(0)).map(|label| label.to_string()).collect()
    }

    /// Divides images to train on, if there is no `held_out`. `what` describes them.
    fn open(
        self,
        held_out: Option<Self>,
        (what, notes, label_field): (&str, Vec<String>, Option<&'static str>),
        opening: Opening<'_>,
    ) -> Result<Data, DataError> {
        let mut hash = blake3::Hasher::new();
        self.hash(&mut hash);
        let Self { shape, mut pixels, mut labels, classes } = self;
        let to_train = labels.len();
        if let Some(held_out) = held_out {
            held_out.hash(&mut hash);
            let unusable = |problem: &str| Err(unusable!("data.{}: {problem}", opening.name));
            if held_out.shape != shape {
                return unusable("the images to validate on have another size than the others");
            }
            if held_out.labels.iter().any(|&label| label as usize >= classes.len()) {
                return unusable("the images to validate on have classes that the others do not have");
            }
            pixels.extend(held_out.pixels);
            labels.extend(held_out.labels);
        }
        let InputShape::Images { channels, height, width } = shape else { unreachable!("images") };
        let (size, own) = (channels * height * width, labels.clone());
        let example = move |at: usize| {
            // Bytes become numbers from -1 to 1.
            let pixels = pixels[at * size..(at + 1) * size].iter().map(|&byte| f32::from(byte) / 127.5 - 1.0);
            Ok(Example { content: Content::Numbers(pixels.collect()), label: own[at], group: 0 })
        };
        let found = Found {
            what: format!("{what}: {width} x {height} pixels of {channels} channels"),
            shape,
            labels,
            to_train,
            classes,
            label_field,
            groups: Vec::new(),
            example: Box::new(example),
            notes,
            hash,
        };
        found.open("", opening)
    }
}
