#![allow(clippy::unwrap_used)]

use std::path::Path;

use polyhead_models::Images;

use crate::{DataConfig, ImageSet, OpenOptions};

fn opened(json: serde_json::Value) -> Result<ImageSet, String> {
    let config: DataConfig = serde_json::from_value(json).unwrap();
    let options = OpenOptions { validation_fraction: 0.25, ..crate::tests::options(0, 4, 3) };
    config.open_images(&options).map_err(|error| error.to_string())
}

/// A PNG whose pixel in row y and column x is (10 y, 10 x, 7).
fn picture(path: &Path, height: u32, width: u32) {
    let pixels: Vec<u8> =
        (0..height).flat_map(|y| (0..width).flat_map(move |x| [10 * y as u8, 10 * x as u8, 7])).collect();
    let mut encoder = png::Encoder::new(std::fs::File::create(path).unwrap(), width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
}

/// Where the first pixel of each image was cut, and whether its blue is that of the picture.
fn corners(images: &Images, side: usize) -> Vec<[usize; 2]> {
    let area = side * side;
    let corner = |pixels: &[f32]| {
        assert!(pixels[2 * area..].iter().all(|&blue| (blue - 7.0 / 255.0).abs() < 1e-6));
        [0, area].map(|at| (pixels[at] * 25.5).round() as usize)
    };
    images.pixels.chunks(3 * area).map(corner).collect()
}

#[test]
fn squares_are_cut_from_files_of_any_size() {
    let folder = tempfile::tempdir().unwrap();
    for (name, height, width) in [("a.png", 6, 9), ("b.png", 12, 4), ("c.png", 4, 4), ("d.png", 8, 8)] {
        picture(&folder.path().join(name), height, width);
    }
    let files = |more: serde_json::Value| {
        let mut table = serde_json::json!({ "paths": [folder.path()], "size": 4 });
        table.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        opened(serde_json::json!({ "image_files": table }))
    };
    let set = files(serde_json::json!({ "turn": false, "validation_paths": [folder.path()] })).unwrap();
    assert_eq!((set.train.batches_per_epoch(), set.train.size()), (1, [4, 4]));
    // To validate: the middle of each, in the order of their names, always.
    for position in [0, 1] {
        assert_eq!(corners(&set.validation.batch(position).unwrap(), 4), [[1, 2], [4, 0], [0, 0], [2, 2]]);
    }
    // To train: each once an epoch, elsewhere in each.
    let epochs: Vec<Vec<[usize; 2]>> = (0..8).map(|epoch| corners(&set.train.batch(epoch).unwrap(), 4)).collect();
    assert!(epochs.iter().all(|corners| corners.iter().all(|[row, column]| *row <= 8 && *column <= 5)), "{epochs:?}");
    assert!(epochs.iter().any(|corners| corners != &epochs[0]), "{epochs:?}");
    assert_eq!(set.train.batch(5).unwrap(), set.train.batch(5).unwrap());
    // Turned and mirrored, a square still is a square of the picture: rows and columns differ by steps of 10.
    let set = files(serde_json::json!({})).unwrap();
    assert!(set.description.ends_with("3 for training, 1 for validation"), "{}", set.description);
    let mut ways = std::collections::BTreeSet::new();
    for pixels in
        (0..20).flat_map(|at| set.train.batch(at).unwrap().pixels.chunks(48).map(<[f32]>::to_vec).collect::<Vec<_>>())
    {
        let step = |plane: usize, to: usize| ((pixels[16 * plane + to] - pixels[16 * plane]) * 25.5).round() as i32;
        ways.insert([step(0, 1), step(0, 4), step(1, 1), step(1, 4)]);
    }
    let sound = |way: &[i32; 4]| way.map(i32::abs) == [0, 1, 1, 0] || way.map(i32::abs) == [1, 0, 0, 1];
    assert!(ways.len() == 8 && ways.iter().all(sound), "{ways:?}");
}

#[test]
fn bad_files_are_told_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let (small, broken) = (folder.path().join("small.png"), folder.path().join("broken.png"));
    picture(&folder.path().join("a.png"), 8, 8);
    picture(&folder.path().join("b.png"), 8, 8);
    let files = |more: &str| {
        let path = folder.path().display();
        opened(
            serde_json::from_str(&format!(r#"{{"image_files": {{"paths": ["{path}"], "size": 6 {more}}}}}"#)).unwrap(),
        )
    };
    picture(&small, 5, 20);
    let told = files("").err().unwrap();
    assert!(told.contains("small.png") && told.contains("20 x 5 pixels") && told.contains("on_bad_file"), "{told}");
    std::fs::write(&broken, b"not an image").unwrap();
    let skipped = files(r#", "on_bad_file": "skip""#).unwrap();
    assert!(skipped.notes[0].contains("small.png") && skipped.notes[0].contains("broken.png"), "{:?}", skipped.notes);
    std::fs::remove_file(&small).unwrap();
    let told = files("").err().unwrap();
    assert!(told.contains("broken.png: not a readable image"), "{told}");
    let none = opened(serde_json::json!({ "image_files": { "paths": ["nowhere/*.png"] } })).err().unwrap();
    assert!(none.contains("nowhere/*.png"), "{none}");
    let told = opened(serde_json::json!({ "patterns": { "size": 4 } })).err().unwrap();
    assert!(told.contains("data.patterns.size: size (4) must be 8 to 1024"), "{told}");
}

#[test]
fn patterns_are_new_without_end_and_the_same_again() {
    let set = opened(serde_json::json!({ "patterns": { "size": 16 } })).unwrap();
    let batch = |position| set.train.batch(position).unwrap();
    assert_eq!((batch(0).len(), batch(0).height, batch(0).width), (4, 16, 16));
    assert_eq!(batch(3), batch(3));
    assert!(batch(0) != batch(1) && batch(0) != set.validation.batch(0).unwrap());
    let all: Vec<f32> = (0..4).flat_map(|at| batch(at).pixels).collect();
    assert!(all.iter().all(|&value| (0.0..=1.0 + 1e-5).contains(&value)));
    let mean = all.iter().sum::<f32>() / all.len() as f32;
    let spread = all.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / all.len() as f32;
    assert!((0.3..0.7).contains(&mean) && spread > 0.02, "{mean}, {spread}");
}
