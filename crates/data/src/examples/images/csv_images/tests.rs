#![allow(clippy::unwrap_used)]
use super::*;
use crate::testing::{Folder, gzip};

/// Pixels, labels, classes and notes.
type Read = (Vec<u8>, Vec<u32>, Vec<String>, Vec<String>);

/// What a table of 1 x 2 pixels, white at 16, is read as.
fn read(text: &[u8], settings: &str) -> Result<Read, String> {
    let dir = Folder::new();
    let path = dir.write("t.csv", text);
    let json = format!(r#"{{"paths": ["{}"], "size": [1, 2], "white": 16{settings}}}"#, path.display());
    let config: CsvImagesConfig = serde_json::from_str(&json).unwrap();
    config.validate(0).map_err(|error| error.problem)?;
    let (images, notes) = config.read().map_err(|error| error.to_string())?;
    Ok((images.pixels, images.labels, images.classes, notes))
}

#[test]
fn a_table_is_read_however_it_was_saved() {
    let plain = read(b"0,16,1\n8,4,0\n", "").unwrap();
    assert_eq!(plain.0, [0, 255, 128, 64]);
    assert_eq!((&plain.1[..], plain.3.len()), (&[1, 0][..], 0));
    for text in [
        "\u{feff}0,16,1\n8,4,0\n",
        "0,16,1\r\n8,4,0\r\n",
        "\"0\",\"16\",\"1\"\r\n8,4,\"0\"",
        "0;16;1\n8;4;0\n",
        "0\t16\t1\n8\t4\t0\n",
        " 0 , 16, 1.0\n\n8, 4 ,0\n\n",
    ] {
        assert_eq!(read(text.as_bytes(), "").unwrap(), plain, "{text:?}");
    }
    let both = [gzip("0,16,1\n"), gzip("8,4,0\n")].concat();
    assert_eq!(read(&both, "").unwrap(), plain, "packed in two pieces, as gzip -c a b makes it");
}

#[test]
fn headings_are_told_apart_from_images() {
    for (text, headed) in [
        ("a,b,c\n0,16,1\n8,4,0\n", true),
        ("0,1,label\n0,16,1\n8,4,0\n", true),
        ("1,2,label\n0,16,cat\n8,4,dog\n", true),
        ("\u{feff}p0,p1,class\r\n0,16,1\r\n8,4,0\r\n", true),
        ("5,9,label\n0,16,1\n8,4,0\n", true),
        ("3,4,cat\n0,16,cat\n8,4,dog\n", false),
        ("0,1,1\n0,16,1\n8,4,0\n", false),
    ] {
        let (pixels, _, _, notes) = read(text.as_bytes(), "").unwrap_or_else(|problem| panic!("{text:?}: {problem}"));
        assert_eq!(pixels.len(), if headed { 4 } else { 6 }, "{text:?}");
        assert_eq!(notes.iter().any(|note| note.contains("headings") && note.contains("t.csv")), headed, "{notes:?}");
    }
    // A broken cell makes no heading of an image.
    let problem = read(b"0,x,1\n8,4,0\n", "").unwrap_err();
    assert!(problem.contains("t.csv:1: cell 2, \"x\", is not a pixel") && problem.contains("headings"), "{problem}");
    assert_eq!(read(b"5,9,7\n8,4,0\n", ", \"headings\": true").unwrap().1, [0]);
}

#[test]
fn the_class_stands_where_it_is_said_to() {
    let text = b"species,left,right\ncat,0,16\ndog,8,4\n";
    for label in [", \"label\": \"species\"", ", \"label\": 0"] {
        let (pixels, labels, classes, _) = read(text, label).unwrap();
        assert_eq!((pixels, labels), (vec![0, 255, 128, 64], vec![0, 1]));
        assert_eq!(classes, ["cat", "dog"]);
    }
    let problem = read(text, ", \"label\": \"kind\"").unwrap_err();
    assert!(problem.contains("no column is called \"kind\"") && problem.contains("species, left, right"), "{problem}");
    assert!(read(text, ", \"label\": 3").unwrap_err().contains("label (3)"));
    let problem = read(b"0,16,0.53\n", "").unwrap_err();
    assert!(
        problem.contains("t.csv:1: cell 3, \"0.53\", is not a class") && problem.contains("csv_images.label"),
        "{problem}"
    );
}

#[test]
fn what_is_no_pixel_is_refused_by_place() {
    for cell in ["nan", "NaN", "inf", "-inf", "1e400", "-5", "17", "", "0x10", "1,5"] {
        let problem = read(format!("0,16,1\n{cell},4,0\n").as_bytes(), "").unwrap_err();
        assert!(problem.contains("t.csv:2: "), "{cell}: {problem}");
    }
    let problem = read(b"0,16,1\n8,4\n", "").unwrap_err();
    assert!(problem.contains("t.csv:2: 2 cells; 1 x 2 pixels and a class are 3"), "{problem}");
    let utf16: Vec<u8> = "0,16,1\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(read(&utf16, "").unwrap_err().contains("t.csv is UTF-16"));
}

#[test]
fn lines_are_counted_however_they_end() {
    for (text, line) in [
        ("0,16,1\n8,4,0\n17,4,0\n", 3),
        ("0,16,1\r\n8,4,0\r\n17,4,0\r\n", 3),
        ("\r\n\r\n0,16,1\r\n\r\n8,4,0\r\n\n17,4,0", 7),
        ("\u{feff}a,b,c\r\n0,16,\"x\r\ny\"\r\n17,4,x\r\n", 4),
        ("0,16,1\r\n8,4,0\r\n8,4\r\n", 3),
    ] {
        let problem = read(text.as_bytes(), "").unwrap_err();
        assert!(problem.contains(&format!("t.csv:{line}: ")), "{text:?}: {problem}");
    }
}

#[test]
fn a_file_that_unpacks_without_end_is_not_kept() {
    let endless = format!("0,16,1\n{}", "0".repeat(64 << 20));
    let problem = read(&gzip(endless), "").unwrap_err();
    assert!(problem.contains("t.csv:2: a line of more than"), "{problem}");
}
