//! A YAML text without one of its fields, so that the rest of it can be looked at.

use serde::de::IgnoredAny;

use super::At;

/// The text without the field whose key stands there, all other lines where they were; nothing where what is left would be
/// no YAML.
pub(super) fn without_field(text: &str, key: At) -> Option<String> {
    let line_start: usize = text.split_inclusive('\n').take(key.line.checked_sub(1)? as usize).map(str::len).sum();
    let row = text.get(line_start..)?;
    let column = row.char_indices().nth(key.column.checked_sub(1)? as usize)?.0;
    let start = line_start + column;
    let within_braces = text[..start].trim_end().ends_with(['{', ',']);
    let end = match within_braces {
        true => end_within_braces(text, start),
        false => end_of_block(text, start, column),
    };
    let removed: String = text.get(start..end)?.chars().filter(|c| *c == '\n').collect();
    let rest = format!("{}{removed}{}", &text[..start], &text[end..]);
    serde_saphyr::from_str::<IgnoredAny>(&rest).is_ok().then_some(rest)
}

/// Where the field ends in `{key: value, …}`: behind its comma, or before the brace.
fn end_within_braces(text: &str, start: usize) -> usize {
    let (mut depth, mut quote) = (0, None);
    for (at, c) in text[start..].char_indices() {
        match (c, quote) {
            (c, Some(open)) if c == open => quote = None,
            (_, Some(_)) => {}
            ('"' | '\'', None) => quote = Some(c),
            ('{' | '[', None) => depth += 1,
            ('}' | ']', None) if depth == 0 => return start + at,
            ('}' | ']', None) => depth -= 1,
            (',', None) if depth == 0 => return start + at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Where the field ends among lines: before the first that is not indented further than its key. A list may stand at the
/// key's own indentation.
fn end_of_block(text: &str, start: usize, column: usize) -> usize {
    let mut at = start;
    for (number, line) in text[start..].split_inclusive('\n').enumerate() {
        let words = line.trim_start_matches(' ');
        let indent = line.len() - words.len();
        let inside =
            number == 0 || words.trim().is_empty() || indent > column || (indent == column && words.starts_with("- "));
        if !inside {
            break;
        }
        at += line.len();
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without(text: &str, key: &str) -> Option<String> {
        let before = &text[..text.find(key).unwrap()];
        let (line, column) = (before.lines().count().max(1), before.rsplit('\n').next().unwrap().len() + 1);
        let line = if before.ends_with('\n') { line + 1 } else { line };
        without_field(text, At { line: line as u64, column: column as u64 })
    }

    #[test]
    fn a_field_goes_with_all_that_is_in_it_and_no_line_moves() {
        let text = "spec:\n  wrong:\n    a: 1\n  - b\n  right: 2\n";
        assert_eq!(without("spec:\n  wrong:\n    a: 1\n  right: 2\n", "wrong").unwrap(), "spec:\n  \n\n  right: 2\n");
        assert_eq!(without(text, "wrong").unwrap(), "spec:\n  \n\n\n  right: 2\n");
        assert_eq!(without("- wrong: []\n  right: 2\n", "wrong").unwrap(), "- \n  right: 2\n");
    }

    #[test]
    fn a_field_within_braces_goes_with_its_comma() {
        assert_eq!(without("a: {wrong: [1, {b: '}'}], right: 2}\n", "wrong").unwrap(), "a: { right: 2}\n");
        assert_eq!(without("a: {right: 2, wrong: 1}\n", "wrong").unwrap(), "a: {right: 2, }\n");
        assert_eq!(without("a: {right: 2,\n  wrong: {\n b: 1}}\n", "wrong").unwrap(), "a: {right: 2,\n  \n}\n");
    }
}
