//! What a document says: the article of a page as Markdown, the text of a PDF. It runs in the process that
//! [`super::convert`] makes for it, and may take what it likes there.

use encoding_rs::{Encoding, UTF_8};
use legible::Options;
use mcp_shared::{error::shorten, limits};

use super::convert::{Document, Source};

/// Characters of a title.
const TITLE: usize = 1_024;
/// Elements of a page.
const ELEMENTS: usize = 200_000;
/// Where a page may say what its characters are.
const HEAD: usize = 1024;

/// Reads a document. The error is a sentence for callers.
pub fn read(source: &Source, bytes: &[u8]) -> Result<Document, String> {
    match source {
        Source::Html { url, charset } => page(&text(bytes, charset.as_deref(), true), url),
        Source::Pdf => pdf(bytes),
    }
}

/// The text that bytes stand for: as a byte order mark says, or the server, or the page itself.
pub fn text(bytes: &[u8], charset: Option<&str>, html: bool) -> String {
    let named = charset.and_then(|label| Encoding::for_label(label.as_bytes()));
    let encoding = named.or_else(|| if html { meta_charset(bytes) } else { None }).unwrap_or(UTF_8);
    encoding.decode(bytes).0.into_owned()
}

/// The character set of `<meta charset=...>`, and of its longer form.
fn meta_charset(bytes: &[u8]) -> Option<&'static Encoding> {
    let head = String::from_utf8_lossy(&bytes[..bytes.len().min(HEAD)]).to_ascii_lowercase();
    let rest = head.split_once("charset")?.1.trim_start().strip_prefix('=')?.trim_start();
    let rest = rest.trim_start_matches(['"', '\'']);
    let label = rest.split(|c: char| !(c.is_ascii_alphanumeric() || "-_:.".contains(c))).next()?;
    Encoding::for_label(label.as_bytes())
}

fn page(html: &str, url: &str) -> Result<Document, String> {
    let options = Options::new().max_elems_to_parse(ELEMENTS);
    match legible::parse(html, Some(url), Some(options)) {
        Ok(article) => Ok(document(article.title, tables(&article.markdown_content))),
        Err(legible::Error::NoContent | legible::Error::NoBody) => Ok(Document::default()),
        Err(error) => Err(error.to_string()),
    }
}

fn pdf(bytes: &[u8]) -> Result<Document, String> {
    let text = pdf_extract::extract_text_from_mem(bytes)
        .map_err(|_| "it is not a PDF that can be read".to_owned())?;
    Ok(document(String::new(), tidy(&text)))
}

/// Lines of a PDF's text, with at most one empty one between them.
fn tidy(text: &str) -> String {
    let mut tidied = String::with_capacity(text.len());
    let mut empty = 0;
    for line in text.lines().map(str::trim_end) {
        empty = if line.trim().is_empty() { empty + 1 } else { 0 };
        if empty < 2 {
            tidied.push_str(line);
            tidied.push('\n');
        }
    }
    tidied.trim().to_owned()
}

fn document(title: String, mut text: String) -> Document {
    let cut = text.len() > limits::WEB_TEXT_BYTES;
    if cut {
        text.truncate((0..=limits::WEB_TEXT_BYTES).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0));
    }
    let title = title.split_whitespace().collect::<Vec<_>>().join(" ");
    Document { title: shorten(&title, TITLE), text, cut }
}

/// Makes tables of rows: cells stand with ` | ` between them, one row a line, and a table needs a line below its first
/// row. Text that looks like this was written with `\|`, so that nothing else does.
fn tables(markdown: &str) -> String {
    let mut out = String::with_capacity(markdown.len() + 256);
    let (mut fence, mut columns) = (None, None);
    for line in markdown.lines() {
        let marks = line.trim_start();
        let ticks = marks.len() - marks.trim_start_matches('`').len();
        match fence {
            Some(open) if ticks >= open && marks.trim_matches('`').trim().is_empty() => fence = None,
            None if ticks >= 3 => fence = Some(ticks),
            _ => {}
        }
        let cells = if fence.is_some() || ticks >= 3 { 0 } else { line.split(" | ").count() };
        if cells < 2 {
            columns = None;
            out.push_str(line);
            out.push('\n');
            continue;
        }
        let head = columns.is_none();
        let wide = *columns.get_or_insert(cells);
        out.push_str("| ");
        out.push_str(line.trim());
        out.push_str(&" |".repeat(wide.saturating_sub(cells)));
        out.push_str(" |\n");
        if head {
            out.push('|');
            out.push_str(&" --- |".repeat(wide));
            out.push('\n');
        }
    }
    out.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_tables_and_nothing_else_does() {
        let text = "a\n\nArt | Höhe\nEiche | 40 m\nBuche \\| Rot | 45 m\n\n```\na | b\n```\n\nx \\| y";
        let expected = "a\n\n| Art | Höhe |\n| --- | --- |\n| Eiche | 40 m |\n| Buche \\| Rot | 45 m |\n\n```\na | b\n```\n\n\
                        x \\| y";
        assert_eq!(tables(text), expected);
    }

    #[test]
    fn characters_are_what_a_page_says_they_are() {
        let html = "<meta charset='windows-1252'><p>B\u{e9}";
        let latin: Vec<u8> = html.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect();
        assert_eq!(text(&latin, None, true), html);
        assert_eq!(text(&latin, Some("iso-8859-1"), false), html);
        assert_eq!(text("ä".as_bytes(), None, true), "ä");
        assert_eq!(text(&[0xff, 0xfe, b'a', 0], Some("utf-8"), false), "a");
    }

    #[test]
    fn hostile_documents_are_read_or_refused() {
        let page = |html: &str| {
            let source = Source::Html { url: "https://example.com/".to_owned(), charset: None };
            read(&source, html.as_bytes())
        };
        assert_eq!(page("").unwrap().text, "");
        assert_eq!(page("<p>short").unwrap().text, "short");
        assert!(page(&"<p>".repeat(ELEMENTS + 10)).is_err());
        assert!(
            !page("<a href='javascript:alert(1)'>click here now</a>").unwrap().text.contains("javascript")
        );
        for pdf in [&b""[..], b"%PDF-1.7", b"%PDF-1.4\nstartxref\n99999999999\n%%EOF", &[0; 1000]] {
            assert!(read(&Source::Pdf, pdf).is_err());
        }
    }
}
