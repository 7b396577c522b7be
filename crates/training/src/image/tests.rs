#![allow(clippy::unwrap_used)]
use super::*;

const DARK: [u8; 3] = VIRIDIS[0];
const BRIGHT: [u8; 3] = VIRIDIS[15];

/// The image's pixels as red, green, blue, row by row.
fn decode(image: &Png) -> Vec<[u8; 3]> {
    let mut decoder = png::Decoder::new(std::io::Cursor::new(&image.bytes));
    decoder.set_transformations(png::Transformations::EXPAND);
    let mut reader = decoder.read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    assert_eq!((info.width, info.height), (image.width, image.height));
    assert_eq!(info.color_type, png::ColorType::Rgb);
    bytes.as_chunks::<3>().0.to_vec()
}

#[test]
fn each_value_fills_its_cell() {
    let options = Options { scale: 3, range: None };
    let values = [0.0, 1.0, f32::NAN, 0.5, -1.0, 0.25];
    let image = heat_map(&values, 2, 3, &options).unwrap();
    assert_eq!((image.width, image.height), (9, 6));
    let pixels = decode(&image);
    let palette = palette(&VIRIDIS);
    for (index, pixel) in pixels.iter().enumerate() {
        let (y, x) = (index / 9, index % 9);
        let entry = entry(values[y / 3 * 3 + x / 3], (-1.0, 1.0)) as usize;
        assert_eq!(pixel, &palette[entry * 3..entry * 3 + 3], "{x}, {y}");
    }
    assert_eq!(pixels[3], BRIGHT);
    assert_eq!(pixels[6], [0x80; 3]);
    assert_eq!(pixels[3 * 9 + 3], DARK);
    assert_eq!(image, heat_map(&values, 2, 3, &options).unwrap());
}

#[test]
fn a_given_range_clamps_and_a_flat_map_is_dark() {
    let options = Options { scale: 1, range: Some((0.0, 0.5)) };
    let pixels = decode(&heat_map(&[-9.0, 0.5, 9.0], 1, 3, &options).unwrap());
    assert_eq!(pixels, [DARK, BRIGHT, BRIGHT]);
    for flat in [[3.0, 3.0], [0.0, 0.0]] {
        let pixels = decode(&heat_map(&flat, 1, 2, &Options { scale: 1, range: None }).unwrap());
        assert_eq!(pixels, [DARK, DARK]);
    }
    let extreme = [f32::MIN, f32::MAX];
    let pixels = decode(&heat_map(&extreme, 1, 2, &Options { scale: 1, range: None }).unwrap());
    assert_eq!(pixels, [DARK, BRIGHT]);
    heat_map(&[f32::NAN], 1, 1, &Options::default()).unwrap();
}

#[test]
fn brightness_rises_along_the_palette() {
    let luminance = |colours: &[[u8; 3]]| -> Vec<f32> {
        let palette = palette(colours);
        assert_eq!(palette.len(), 256 * 3);
        let colours = palette[..usize::from(COLOURS) * 3].as_chunks::<3>().0.iter();
        colours.map(|[r, g, b]| 0.2126 * f32::from(*r) + 0.7152 * f32::from(*g) + 0.0722 * f32::from(*b)).collect()
    };
    let rising = luminance(&VIRIDIS);
    assert!(rising.windows(6).all(|w| w[5] > w[0]), "{rising:?}");
    let signed = luminance(&ORANGE_TO_BLUE);
    let (below, above) = signed.split_at(signed.len() / 2);
    assert!(below.windows(6).all(|w| w[5] > w[0]) && above.windows(6).all(|w| w[5] < w[0]), "{signed:?}");
    assert_eq!(palette(&VIRIDIS)[252 * 3..253 * 3], BRIGHT);
    assert_eq!(palette(&ORANGE_TO_BLUE)[126 * 3..127 * 3], [0xff; 3]);
}

#[test]
fn heads_are_tiled_with_one_scale_of_colours() {
    // Three heads of 2 x 2: a grid of 2 x 2 with one place empty.
    let maps = vec![vec![1.0, 0.0, 0.5, 0.5], vec![0.25, 0.0, 0.0, 0.25], vec![0.0, 0.0, 0.0, 2.0]];
    let image = attention_grid(&maps, 2, 2).unwrap();
    let side = 2 * 16;
    let ground = [0xd8; 3];
    assert_eq!(image.width as usize, 2 * side + GAP);
    assert_eq!(image.height as usize, 2 * side + GAP);
    let pixels = decode(&image);
    let at = |x: usize, y: usize| pixels[y * image.width as usize + x];
    assert_eq!(at(16, 0), [0xff; 3]); // nothing is attended to
    assert_eq!(at(side, 0), ground); // the gap
    assert_eq!(at(image.width as usize - 1, image.height as usize - 1), ground);
    assert_eq!(at(side - 1, image.height as usize - 1), BRIGHT);
    // 1.0 of the first head and 2.0 of the third: half as bright, not both brightest.
    assert_ne!(at(0, 0), BRIGHT);
    assert_eq!(image, attention_grid(&maps, 2, 2).unwrap());
}

#[test]
fn weights_below_0_have_a_colour_of_their_own() {
    let image = attention_grid(&[vec![1.0, -1.0, 0.25, f32::NAN]], 2, 2).unwrap();
    let pixels = decode(&image);
    let at = |x: usize, y: usize| pixels[16 * y * image.width as usize + 16 * x];
    assert_eq!([at(0, 0), at(1, 0)], [ORANGE_TO_BLUE[8], ORANGE_TO_BLUE[0]]);
    // A quarter of the largest weight is half way to its colour.
    assert_eq!([at(0, 1), at(1, 1)], [ORANGE_TO_BLUE[6], [0x80; 3]]);
}

#[test]
fn large_maps_are_shrunk_without_losing_a_narrow_line() {
    let (rows, cols) = (300, 1000);
    let mut map = vec![0.0; rows * cols];
    for row in 0..rows {
        map[row * cols + 501] = 1.0;
    }
    let image = attention_grid(&[map], rows, cols).unwrap();
    assert_eq!((image.width, image.height), (250, 75)); // 4 cells in one, not magnified
    let bright = decode(&image).iter().filter(|p| **p == BRIGHT).count();
    assert_eq!(bright, 75);
    assert_eq!(pool(&[1.0, -3.0, 2.0, f32::NAN, 0.0, 4.0], 3, 2)[1], 4.0);
    assert!(pool(&[1.0, -3.0, 2.0, f32::NAN, 0.0, 4.0], 3, 2)[0].is_nan());
}

#[test]
fn unusable_input_is_refused_by_name() {
    let refused = |result: Result<Png, ImageError>, part: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    };
    let options = Options::default();
    refused(heat_map(&[0.0; 5], 2, 3, &options), "rows (2) x cols (3)");
    refused(heat_map(&[], 0, 3, &options), "rows");
    refused(heat_map(&[0.0], usize::MAX, 2, &options), "values");
    refused(attention_grid(&[], 2, 2), "maps");
    refused(attention_grid(&[vec![0.0; 4], vec![0.0; 3]], 2, 2), "3");
    let scaled = |scale, range| Options { scale, range };
    refused(heat_map(&[0.0], 1, 1, &scaled(0, None)), "scale");
    refused(heat_map(&[0.0], 1, 1, &scaled(u32::MAX, None)), "lower scale");
    refused(heat_map(&[0.0], 1, 1, &scaled(1, Some((1.0, 1.0)))), "range");
}
