//! The text of an HTML page.

use scraper::{ElementRef, Html, Node, Selector};

/// Elements that begin a new line.
const BLOCKS: &str = "p div h1 h2 h3 h4 h5 h6 li ul ol pre table tr blockquote section dl dt br";
/// Elements whose text nobody reads.
const SKIPPED: &str = "script style nav button svg head template noscript form";

/// The readable text of a page's main part (`main`, rustdoc's `#main-content`, else `body`): paragraphs apart, code as it
/// stands.
pub fn html_to_text(html: &str) -> String {
    let page = Html::parse_document(html);
    let main = ["main", "#main-content", "body"].iter().find_map(|name| {
        let selector = Selector::parse(name).ok()?;
        page.select(&selector).next()
    });
    let mut text = String::new();
    if let Some(main) = main {
        append(main, false, &mut text);
    }
    tidy(&text)
}

fn append(element: ElementRef<'_>, verbatim: bool, text: &mut String) {
    for child in element.children() {
        match child.value() {
            Node::Text(words) if verbatim => text.push_str(words),
            Node::Text(words) => {
                // White space folds, also across elements.
                for (index, word) in words.split_whitespace().enumerate() {
                    let gap = index > 0 || words.starts_with(char::is_whitespace);
                    if gap && !text.ends_with(char::is_whitespace) {
                        text.push(' ');
                    }
                    text.push_str(word);
                }
                if words.ends_with(char::is_whitespace) && !text.ends_with(char::is_whitespace) {
                    text.push(' ');
                }
            }
            Node::Element(tag) if !has(SKIPPED, tag.name()) => {
                let Some(child) = ElementRef::wrap(child) else { continue };
                let block = has(BLOCKS, tag.name());
                if block {
                    text.push('\n');
                }
                if tag.name() == "li" {
                    text.push_str("- ");
                }
                append(child, verbatim || tag.name() == "pre", text);
                if block {
                    text.push('\n');
                }
            }
            _ => {}
        }
    }
}

fn has(names: &str, name: &str) -> bool {
    names.split(' ').any(|one| one == name)
}

/// No white space at line ends, at most one empty line in a row.
fn tidy(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut empty = 1;
    for line in text.lines().map(str::trim_end) {
        empty = if line.trim().is_empty() { empty + 1 } else { 0 };
        if empty == 0 {
            out.push_str(line);
            out.push('\n');
        } else if empty == 1 {
            out.push('\n');
        }
    }
    out.trim_end().to_owned() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_a_reader_sees() {
        let html = "<html><head><title>x</title></head><body><nav>menu</nav><main><h1>Title &amp; more</h1>\
            <p>Some <em>folded</em>\n   words.</p><ul><li>one</li><li>two</li></ul>\
            <pre><code>fn main() {\n    1\n}</code></pre><script>no()</script></main><footer>foot</footer></body></html>";
        let text = html_to_text(html);
        assert_eq!(text, "Title & more\n\nSome folded words.\n\n- one\n\n- two\n\nfn main() {\n    1\n}\n");
    }
}
