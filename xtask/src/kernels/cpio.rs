//! Archives that the kernel unpacks into its first file system: cpio's "newc" format
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::Path,
};

/// `S_IFDIR | 0755`
const DIRECTORY: u32 = 0o040_755;
/// `S_IFREG | 0755`
const FILE: u32 = 0o100_755;

/// Writes an archive.
#[derive(Debug)]
pub(super) struct Writer<W> {
    output: W,
    directories: BTreeSet<String>,
    inode: u32,
}

impl<W: Write> Writer<W> {
    pub(super) fn new(output: W) -> Self {
        Self { output, directories: BTreeSet::new(), inode: 0 }
    }

    /// Adds an executable file at an absolute path, and the directories above it.
    pub(super) fn file(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        if let Some(parent) = Path::new(path).parent().and_then(Path::to_str) {
            self.directory(parent)?;
        }
        self.entry(path, FILE, content)
    }

    /// Adds a directory, and those above it.
    pub(super) fn directory(&mut self, path: &str) -> io::Result<()> {
        let mut above = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if !above.is_empty() {
                above.push('/');
            }
            above.push_str(part);
            if self.directories.insert(above.clone()) {
                self.entry(&above, DIRECTORY, &[])?;
            }
        }
        Ok(())
    }

    /// Ends the archive. Another may follow it in the same file.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.output)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let length = u32::try_from(content.len()).map_err(io::Error::other)?;
        let name_length = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        // Magic, inode, mode, user, group, links, time, length, device (2), device of a node (2), name's length, sum.
        let header = [self.inode, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, name_length, 0];
        self.output.write_all(b"070701")?;
        for number in header {
            write!(self.output, "{number:08x}")?;
        }
        self.output.write_all(name.as_bytes())?;
        // Header and name together are padded to four bytes; the name ends with a zero.
        self.output.write_all(&[0; 4][..1 + padding(110 + name.len() + 1)])?;
        self.output.write_all(content)?;
        self.output.write_all(&[0; 4][..padding(content.len())])
    }
}

fn padding(length: usize) -> usize {
    length.next_multiple_of(4) - length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_directories_and_the_trailer_are_aligned() {
        let mut writer = Writer::new(Vec::new());
        writer.file("/usr/bin/true", b"abc").expect("memory");
        writer.file("/usr/bin/false", b"").expect("memory");
        let archive = writer.finish().expect("memory");
        let text = String::from_utf8_lossy(&archive);
        let starts: Vec<_> = text.match_indices("070701").map(|(index, _)| index).collect();
        assert!(starts.iter().all(|start| start % 4 == 0), "{starts:?}");
        assert_eq!(starts.len(), 5, "usr, usr/bin, two files, the trailer");
        assert_eq!(archive.len() % 4, 0);
        assert!(text.contains("usr/bin/true\0") && text.contains("abc\0"));
    }
}
