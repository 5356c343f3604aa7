//! The text of a key ring, as an operator keeps it in a file: keys are added, put first and taken out, and
//! everything else, comments above all, stays as it is.

use secrecy::{ExposeSecret, SecretString};

use super::keys::{KeyError, TEXT_REFERENCE, is_kid};

/// The lines of a key ring. They are understood only as far as their ids: whether the keys are good is for
/// [`super::KeyRing`] to say.
pub struct RingText(SecretString);

impl RingText {
    /// Takes the contents of a file.
    pub fn new(contents: SecretString) -> Self {
        Self(contents)
    }

    /// The contents.
    pub fn contents(&self) -> &SecretString {
        &self.0
    }

    /// The ids of all keys, the primary first.
    pub fn kids(&self) -> Vec<String> {
        self.0.expose_secret().lines().filter_map(kid).map(str::to_owned).collect()
    }

    /// Whether one of the keys is that of `SECRETS_KEY`.
    pub fn refers_to_text(&self) -> bool {
        let key = |line: &str| {
            kid(line)
                .is_some_and(|_| line.split_once(':').is_some_and(|(_, key)| key.trim() == TEXT_REFERENCE))
        };
        self.0.expose_secret().lines().any(key)
    }

    /// An id that no key here has: `k` and the number after the highest of those that look like that. `used`
    /// says of other ids that they are taken.
    pub fn free_kid(&self, used: impl Fn(&str) -> bool) -> String {
        let kids = self.kids();
        let numbers = kids.iter().filter_map(|kid| kid.strip_prefix('k')?.parse::<u32>().ok());
        let mut number = numbers.max().unwrap_or(0).saturating_add(1);
        loop {
            let kid = format!("k{number}");
            if !kids.contains(&kid) && !used(&kid) {
                return kid;
            }
            number = number.saturating_add(1);
        }
    }

    /// With a key behind the others. `line` is one of a key ring.
    pub fn with(&self, line: &SecretString) -> Result<Self, KeyError> {
        let line = line.expose_secret();
        let new = kid(line).ok_or(KeyError::Kid)?;
        if self.kids().iter().any(|own| own == new) {
            return Err(KeyError::Ring { what: format!("has a key {new} already") });
        }
        let old = self.0.expose_secret();
        // Room for all of it from the start, so that no part of it stays behind in freed memory.
        let mut text = String::with_capacity(old.len() + line.len() + 2);
        text.push_str(old);
        if !old.is_empty() && !old.ends_with('\n') {
            text.push('\n');
        }
        text.push_str(line);
        text.push('\n');
        Ok(Self(text.into()))
    }

    /// With this key before the others, so that it encrypts.
    pub fn promoted(&self, primary: &str) -> Result<Self, KeyError> {
        let lines = self.0.expose_secret().lines();
        let (mut found, mut rest) = (None, Vec::new());
        let mut first = None;
        for line in lines {
            match kid(line) {
                Some(own) if own == primary => found = Some(line),
                other => {
                    // Comments above the first key stay above it.
                    if other.is_some() {
                        first.get_or_insert(rest.len());
                    }
                    rest.push(line);
                }
            }
        }
        let found = found.ok_or_else(|| lacks(primary))?;
        rest.insert(first.unwrap_or(rest.len()), found);
        Ok(self.of_lines(&rest))
    }

    /// Without a key, which must not be the one that encrypts.
    pub fn without(&self, gone: &str) -> Result<Self, KeyError> {
        let kids = self.kids();
        if !kids.iter().any(|own| own == gone) {
            return Err(lacks(gone));
        }
        if kids.first().is_some_and(|first| first == gone) {
            return Err(KeyError::Ring {
                what: format!("encrypts with {gone}: make another key the first one before"),
            });
        }
        let rest: Vec<&str> = self.0.expose_secret().lines().filter(|line| kid(line) != Some(gone)).collect();
        Ok(self.of_lines(&rest))
    }

    fn of_lines(&self, lines: &[&str]) -> Self {
        let mut text = String::with_capacity(self.0.expose_secret().len() + 1);
        for line in lines {
            text.push_str(line);
            text.push('\n');
        }
        Self(text.into())
    }
}

/// The id of the key that stands in a line.
fn kid(line: &str) -> Option<&str> {
    let (kid, _) = line.trim().split_once(':')?;
    is_kid(kid).then_some(kid)
}

fn lacks(kid: &str) -> KeyError {
    KeyError::Ring { what: format!("has no key {}", crate::error::shorten(kid, 16)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(text: &str) -> RingText {
        RingText::new(text.into())
    }

    fn text(ring: &RingText) -> &str {
        ring.contents().expose_secret()
    }

    #[test]
    fn keys_come_and_go_and_comments_stay() {
        let first = ring("# ours\n\nk1:AAAA");
        assert_eq!(first.kids(), ["k1"]);
        let second = first.with(&"k2:BBBB".into()).unwrap();
        assert_eq!(text(&second), "# ours\n\nk1:AAAA\nk2:BBBB\n");
        let promoted = second.promoted("k2").unwrap();
        assert_eq!(text(&promoted), "# ours\n\nk2:BBBB\nk1:AAAA\n");
        assert_eq!(text(&promoted.promoted("k2").unwrap()), text(&promoted));
        assert_eq!(text(&promoted.without("k1").unwrap()), "# ours\n\nk2:BBBB\n");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let ring = ring("k2:BBBB\nk1:AAAA\n");
        assert!(matches!(ring.with(&"k1:CCCC".into()), Err(KeyError::Ring { .. })));
        assert_eq!(ring.with(&"K 1:CCCC".into()).err(), Some(KeyError::Kid));
        assert!(matches!(ring.promoted("k3"), Err(KeyError::Ring { .. })));
        assert!(matches!(ring.without("k3"), Err(KeyError::Ring { .. })));
        let first = ring.without("k2").err().unwrap().to_string();
        assert!(first.contains("encrypts with k2") && !first.contains("BBBB"), "{first}");
    }

    #[test]
    fn new_ids_were_never_used() {
        assert_eq!(ring("").free_kid(|_| false), "k1");
        assert_eq!(ring("k1:A\nmain:B\nk7:C\n").free_kid(|_| false), "k8");
        assert_eq!(ring("k1:A").free_kid(|kid| matches!(kid, "k2" | "k3")), "k4");
    }

    #[test]
    fn the_key_of_a_setting_is_known_by_its_name() {
        assert!(ring("k2:A\nk1: SECRETS_KEY\n").refers_to_text());
        assert!(!ring("# k1:SECRETS_KEY\nk1:AAAA\n").refers_to_text());
    }
}
