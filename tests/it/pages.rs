//! Pages as a person opens them: whole in themselves, and shown by a real browser where there is one.

use std::path::{Path, PathBuf};
use std::process::Command;

use scraper::{Html, Selector};

/// A page that needs nothing else, looks right on light and dark ground, and fits a narrow screen.
pub fn assert_whole(page: &Path) {
    let text = std::fs::read_to_string(page).unwrap();
    let figures = assert_self_contained(&text);
    let Some(browser) = browser() else {
        println!("no Chromium here: {} was not seen in a browser", page.display());
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    // The copy tells what the browser made of it: its width, the window's, and how many figures have an area.
    let measure = "<script>onload = () => document.title = [document.documentElement.scrollWidth, innerWidth, \
                   [...document.querySelectorAll('figure svg, figure img')].filter(f => f.getBoundingClientRect().height > 20).length, \
                   [...document.images].filter(i => !i.naturalWidth).length].join(' ')</script></body>";
    let copy = folder.path().join("page.html");
    std::fs::write(&copy, text.replace("</body>", measure)).unwrap();
    let output = browse(&browser, folder.path(), &["--dump-dom", "--window-size=500,900"], &copy);
    let dom = String::from_utf8_lossy(&output);
    let title = dom.split("<title>").nth(1).and_then(|rest| rest.split("</title>").next()).unwrap();
    let numbers: Vec<usize> = title.split(' ').map(|number| number.parse().unwrap()).collect();
    assert!(numbers[0] <= numbers[1], "the page is {} wide on a screen of {}", numbers[0], numbers[1]);
    assert_eq!(&numbers[2..], [figures, 0], "figures shown, images that did not load");
    let light = brightness(&browser, folder.path(), page, "1");
    let dark = brightness(&browser, folder.path(), page, "0");
    assert!(light > 180.0 && dark < 80.0, "mean brightness {light} on light ground, {dark} on dark");
}

/// Nothing in the page refers to anything outside; gives how many figures it has.
fn assert_self_contained(text: &str) -> usize {
    let page = Html::parse_document(text);
    let all = |what: &str| page.select(&Selector::parse(what).unwrap()).collect::<Vec<_>>();
    for element in all("*") {
        for (name, value) in element.value().attrs() {
            let refers = ["src", "href", "srcset", "data", "poster", "action", "xlink:href"].contains(&name);
            let inside = value.starts_with("data:") || value.starts_with('#');
            assert!(!refers || inside, "{} refers to {value}", element.value().name());
            assert!(!name.starts_with("on") && !value.contains("url("), "{name}={value}");
        }
        assert!(!["script", "iframe", "object", "embed"].contains(&element.value().name()));
    }
    for style in all("style") {
        let css: String = style.text().collect();
        assert!(!css.contains("url(") && !css.contains("@import"), "{css}");
    }
    assert!(!text.contains("NaN"), "a number is none");
    all("figure svg, figure img").len()
}

fn browser() -> Option<PathBuf> {
    let folders = std::env::split_paths(&std::env::var_os("PATH")?).collect::<Vec<_>>();
    let names = ["chromium", "chromium-browser", "google-chrome"];
    names.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name))).find(|path| path.is_file())
}

/// Opens a page; whatever the browser complains about fails the test.
fn browse(browser: &Path, folder: &Path, arguments: &[&str], page: &Path) -> Vec<u8> {
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args(["--enable-logging=stderr", "--virtual-time-budget=2000"])
        .arg(format!("--user-data-dir={}", folder.join("profile").display()))
        .args(arguments)
        .arg(format!("file://{}", page.canonicalize().unwrap().display()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    for complaint in ["CONSOLE", "Failed to load", "net::ERR"] {
        assert!(!said.contains(complaint), "{}: {said}", page.display());
    }
    output.stdout
}

/// The mean of all pixels of a screenshot, 0 to 255.
fn brightness(browser: &Path, folder: &Path, page: &Path, scheme: &str) -> f64 {
    let file = folder.join(format!("shot-{scheme}.png"));
    let shot = format!("--screenshot={}", file.display());
    let scheme = format!("--blink-settings=preferredColorScheme={scheme}");
    browse(browser, folder, &[&shot, &scheme, "--window-size=1000,1600"], page);
    let image = std::io::BufReader::new(std::fs::File::open(file).unwrap());
    let mut reader = png::Decoder::new(image).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    pixels.iter().map(|&value| f64::from(value)).sum::<f64>() / pixels.len() as f64
}
