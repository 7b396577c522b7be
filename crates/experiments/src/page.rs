//! Pages that need nothing else, neither network nor scripts: on light and dark ground, on wide and narrow screens.

use std::fmt::Write;

/// How pages look, and the colours of figures.
const STYLE: &str = include_str!("page.css");

/// A page around a body.
pub fn page(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{}</title>\n\
         <link rel=\"icon\" href=\"data:,\">\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        escape(title)
    )
}

/// Text for a page.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A table that scrolls inside its box where it is wider than the page.
pub fn table(head: &[String], rows: Vec<Vec<String>>) -> String {
    let cells = |cells: &[String], tag: &str| -> String {
        cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect()
    };
    let mut out = format!("<div class=\"scroll\" tabindex=\"0\"><table>\n<tr>{}</tr>\n", cells(head, "th"));
    for row in rows {
        let _ = writeln!(out, "<tr>{}</tr>", cells(&row, "td"));
    }
    out.push_str("</table></div>\n");
    out
}

/// An image that keeps its width, and scrolls inside its box where the page is narrower.
pub fn wide(image: &str) -> String {
    format!("<div class=\"wide\" tabindex=\"0\">{image}</div>")
}

/// A figure with its title.
pub fn figure(title: &str, small: &str, content: &str) -> String {
    let small = if small.is_empty() { String::new() } else { format!("<small>{}</small>", escape(small)) };
    format!("<figure><figcaption>{}{small}</figcaption>\n{content}</figure>\n", escape(title))
}
