//! The secret that flows are hashed with: with it, nobody outside can aim at a slot.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

/// Why there is no hash key. Never quotes the file.
#[derive(Debug, thiserror::Error)]
pub enum HashKeyError {
    /// The file could not be read.
    #[error(
        "cannot read hash_key_file {}: {source}\n   = help: make one with `head -c16 /dev/urandom | od -An -tx1 | \
         tr -d ' \\n' > {}`, and copy it to the other load balancers of the VIP",
        .path.display(), .path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file holds something else.
    #[error("hash_key_file {} is not a key: it must hold 32 hexadecimal digits and nothing else", .0.display())]
    Format(PathBuf),
    /// The kernel gave no random bytes.
    #[error("cannot read random bytes from /dev/urandom: {0}")]
    Random(io::Error),
}

/// The key in a file; a random one without.
pub fn load(file: Option<&Path>) -> Result<[u64; 2], HashKeyError> {
    match file {
        Some(path) => read(path),
        None => random().map_err(HashKeyError::Random),
    }
}

fn read(path: &Path) -> Result<[u64; 2], HashKeyError> {
    /// Longer than a key with any white space around it.
    const LONGEST: u64 = 256;
    let mut text = String::new();
    let file = File::open(path).and_then(|file| file.take(LONGEST).read_to_string(&mut text));
    match file {
        Err(source) if source.kind() != io::ErrorKind::InvalidData => {
            return Err(HashKeyError::Read { path: path.to_owned(), source });
        }
        Err(_not_text) => return Err(HashKeyError::Format(path.to_owned())),
        Ok(_) => {}
    }
    parse(text.trim()).ok_or_else(|| HashKeyError::Format(path.to_owned()))
}

fn parse(digits: &str) -> Option<[u64; 2]> {
    // `from_str_radix` would take a sign.
    let hexadecimal = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let number = u128::from_str_radix(digits, 16).ok().filter(|_| hexadecimal)?;
    Some([(number >> 64) as u64, number as u64])
}

fn random() -> io::Result<[u64; 2]> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let number = u128::from_ne_bytes(bytes);
    Ok([(number >> 64) as u64, number as u64])
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_key_is_thirty_two_digits() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        fs::write(&path, "000102030405060708090a0b0c0d0e0f\n").unwrap();
        assert_eq!(load(Some(&path)).unwrap(), [0x0001_0203_0405_0607, 0x0809_0a0b_0c0d_0e0f]);
        for broken in ["", "secret", "+00102030405060708090a0b0c0d0e0f", "000102030405060708090a0b0c0d0e0f00"]
        {
            fs::write(&path, broken).unwrap();
            let message = load(Some(&path)).unwrap_err().to_string();
            assert!(message.contains("32 hexadecimal digits"), "{message}");
            assert!(broken.is_empty() || !message.contains(broken), "a secret is not repeated");
        }
        fs::write(&path, [0xff; 32]).unwrap();
        assert!(matches!(load(Some(&path)), Err(HashKeyError::Format(_))));
    }

    #[test]
    fn an_absent_file_is_an_error_and_no_file_is_a_random_key() {
        assert!(matches!(load(Some(Path::new("/nonexistent"))), Err(HashKeyError::Read { .. })));
        assert_ne!(load(None).unwrap(), load(None).unwrap());
    }
}
