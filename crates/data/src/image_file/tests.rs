#![allow(clippy::unwrap_used)]
use super::*;

/// Images of 24 x 16 pixels that Pillow wrote (see `tests/images/make.py`): the upper left quarter red, the upper right green, the
/// lower left blue, the lower right white, so that no two of the eight ways up are alike.
const FILES: [(&str, &[u8]); 11] = [
    ("baseline.jpg", include_bytes!("../../tests/images/baseline.jpg")),
    ("progressive.jpg", include_bytes!("../../tests/images/progressive.jpg")),
    ("restarts.jpg", include_bytes!("../../tests/images/restarts.jpg")),
    ("rgb.png", include_bytes!("../../tests/images/rgb.png")),
    ("palette.png", include_bytes!("../../tests/images/palette.png")),
    ("lossless.webp", include_bytes!("../../tests/images/lossless.webp")),
    ("lossy.webp", include_bytes!("../../tests/images/lossy.webp")),
    ("still.gif", include_bytes!("../../tests/images/still.gif")),
    ("lzw.tif", include_bytes!("../../tests/images/lzw.tif")),
    ("sixteen.tif", include_bytes!("../../tests/images/sixteen.tif")),
    ("plain.bmp", include_bytes!("../../tests/images/plain.bmp")),
];
const QUARTERS: [[u8; 3]; 4] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]];

fn file(name: &str) -> &'static [u8] {
    FILES.iter().find(|(own, _)| *own == name).unwrap().1
}

/// The colours amid the quarters: upper left, upper right, lower left, lower right.
fn quarters(image: &Image) -> [[u8; 3]; 4] {
    [(1, 1), (1, 3), (3, 1), (3, 3)].map(|(y, x)| {
        let at = 3 * (y * image.height / 4 * image.width + x * image.width / 4);
        image.pixels[at..at + 3].try_into().unwrap()
    })
}

fn close(got: [[u8; 3]; 4], expected: [[u8; 3]; 4]) -> bool {
    got.iter().flatten().zip(expected.iter().flatten()).all(|(a, b)| a.abs_diff(*b) < 40)
}

#[test]
fn every_kind_is_read() {
    for (name, bytes) in FILES {
        let image = decode(bytes).unwrap_or_else(|problem| panic!("{name}: {problem}"));
        assert_eq!((image.height, image.width, image.turned), (16, 24, false), "{name}");
        let grey = name == "sixteen.tif";
        let expected = if grey { [[76; 3], [150; 3], [29; 3], [255; 3]] } else { QUARTERS };
        assert!(close(quarters(&image), expected), "{name}: {:?}", quarters(&image));
        assert!(!image.first_of_several, "{name}");
    }
}

#[test]
fn whatever_is_cut_off_is_refused() {
    for (name, bytes) in FILES {
        for length in 0..bytes.len() {
            // The last row of a BMP ends the file; a GIF, a WebP and a TIFF may end in a byte that says nothing.
            let spare = matches!(name, "still.gif" | "lossy.webp" | "lossless.webp" | "lzw.tif" | "sixteen.tif");
            let read = decode(&bytes[..length]);
            assert!(read.is_err() || (spare && read == decode(bytes)), "{name} cut to {length} of {}", bytes.len());
        }
    }
}

#[test]
fn a_jpeg_whose_end_comes_too_early_is_refused() {
    for name in ["baseline.jpg", "restarts.jpg"] {
        let bytes = file(name);
        let start = bytes.windows(2).rposition(|pair| pair == [0xff, 0xda]).unwrap() + 14;
        for length in start..bytes.len() - 3 {
            let cut = [&bytes[..length], &[0xff, 0xd9]].concat();
            assert!(decode(&cut).is_err(), "{name} ended at {length} of {}", bytes.len());
        }
    }
}

#[test]
fn exif_says_which_way_up() {
    // What the upper left corner of the file is, and what a viewer shows: upper left, upper right, lower left, lower right.
    let [a, b, c, d] = QUARTERS;
    let shown = [
        [a, b, c, d],
        [b, a, d, c],
        [d, c, b, a],
        [c, d, a, b],
        [a, c, b, d],
        [c, a, d, b],
        [d, b, c, a],
        [b, d, a, c],
    ];
    for (number, expected) in (1u8..).zip(shown) {
        let tiff = |little: bool| -> Vec<u8> {
            match little {
                true => {
                    [&b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0"[..], &[number, 0, 0, 0, 0, 0, 0, 0]].concat()
                }
                false => {
                    [&b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01"[..], &[0, number, 0, 0, 0, 0, 0, 0]].concat()
                }
            }
        };
        for little in [true, false] {
            let exif = tiff(little);
            let segment = [&b"Exif\0\0"[..], &exif].concat();
            let length = (segment.len() as u16 + 2).to_be_bytes();
            let jpeg = [&[0xff, 0xd8, 0xff, 0xe1], &length[..], &segment, &file("baseline.jpg")[2..]].concat();
            let mut png = file("rgb.png").to_vec();
            let end = png.len() - 12;
            let mut chunk = (exif.len() as u32).to_be_bytes().to_vec();
            chunk.extend(b"eXIf");
            chunk.extend(&exif);
            let sum = checksum(&chunk[4..]);
            chunk.extend(sum.to_be_bytes());
            png.splice(end..end, chunk);
            for (kind, bytes) in
                [("JPEG", jpeg), ("PNG", png), ("WebP", webp_with(&exif)), ("WebP", webp_with(&segment))]
            {
                let image = decode(&bytes).unwrap_or_else(|problem| panic!("{kind} {number}: {problem}"));
                assert!(close(quarters(&image), expected), "{kind} {number}: {:?}", quarters(&image));
                assert_eq!((image.height, image.turned), (if number < 5 { 16 } else { 24 }, number > 1));
            }
        }
    }
}

/// CRC-32 as PNG has it.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 })
    })
}

/// The lossless WebP in its extended form, with EXIF data.
fn webp_with(exif: &[u8]) -> Vec<u8> {
    let plain = &file("lossless.webp")[12..];
    let header = [&b"VP8X\x0a\0\0\0\x08\0\0\0"[..], &[23, 0, 0, 15, 0, 0]].concat();
    let mut chunk = [&b"EXIF"[..], &(exif.len() as u32).to_le_bytes(), exif].concat();
    chunk.resize(chunk.len().next_multiple_of(2), 0);
    let body = [b"WEBP", &header[..], plain, &chunk].concat();
    [b"RIFF", &(body.len() as u32).to_le_bytes()[..], &body].concat()
}

#[test]
fn headers_that_promise_too_much_are_refused_at_once() {
    let mut png = file("rgb.png").to_vec();
    png[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
    let sum = checksum(&png[12..29]).to_be_bytes();
    png[29..33].copy_from_slice(&sum);
    let mut gif = file("still.gif").to_vec();
    gif[6..10].fill(0xff);
    for bytes in [png, gif] {
        let problem = decode(&bytes).unwrap_err();
        assert!(problem.contains("its header promises 65"), "{problem}");
    }
    assert!(decode(b"").unwrap_err().contains("empty"));
    assert!(decode(b"\0\0\0\x18ftypheic").unwrap_err().contains("HEIC"));
    assert!(decode(b"no image").unwrap_err().contains("not a readable image"));
}

#[test]
fn of_several_images_the_first_is_taken_and_that_is_known() {
    for (name, bytes) in [
        ("GIF", &include_bytes!("../../tests/images/moving.gif")[..]),
        ("WebP", include_bytes!("../../tests/images/moving.webp")),
        ("TIFF", include_bytes!("../../tests/images/pages.tif")),
    ] {
        let image = decode(bytes).unwrap_or_else(|problem| panic!("{name}: {problem}"));
        assert!(image.first_of_several, "{name}");
        assert!(close(quarters(&image), QUARTERS), "{name}: {:?}", quarters(&image));
    }
}
