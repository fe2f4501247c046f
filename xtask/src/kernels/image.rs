//! What a guest boots from: the kernel's image, and archives of its first file system: the kernel's modules, and the
//! programs that the cases run.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    hash::{DefaultHasher, Hasher as _},
    io::{self, BufWriter, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{archive::Archive, cpio::Writer, modules, series::Stock};
use crate::process;

/// Programs of this machine that the laboratory runs, and those of util-linux.
const TOOLS: [&str; 8] = ["ip", "tc", "ss", "nft", "ethtool", "curl", "nsenter", "sh"];
/// The process that the kernel starts.
pub(super) const INIT: &str = "/usr/bin/sheave-guest";

/// A kernel that can be booted.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) image: PathBuf,
    pub(super) modules: PathBuf,
}

impl Kernel {
    /// Unpacks a kernel's packages and keeps what a guest needs of them, below `directory`.
    ///
    /// # Errors
    ///
    /// A package cannot be downloaded or unpacked.
    pub(super) fn prepare(archive: &Archive, stock: &Stock, directory: &Path) -> Result<Self> {
        let kept = digest((modules::WANTED, stock.has_modules));
        let place = directory.join(format!("{}-{kept:016x}", stock.release));
        let kernel = Self { image: place.join("vmlinuz"), modules: place.join("modules.cpio") };
        if kernel.modules.exists() {
            return Ok(kernel);
        }
        let files: Vec<_> =
            stock.packages.iter().map(|package| archive.fetch(package)).collect::<Result<_>>()?;
        process::phase(format_args!("unpacking Linux {}", stock.release));
        fs::create_dir_all(&place).with_context(|| format!("making {}", place.display()))?;
        let tree = place.join("unpacked");
        for file in files {
            process::run(Command::new("dpkg-deb").arg("--extract").arg(file).arg(&tree))?;
        }
        let image = [
            tree.join("boot").join(format!("vmlinuz-{}", stock.release)),
            tree.join("usr/lib/modules").join(&stock.release).join("vmlinuz"),
        ];
        let image = image.iter().find(|path| path.is_file()).context("the packages hold no kernel image")?;
        fs::copy(image, &kernel.image)?;
        let modules = if stock.has_modules { modules::collect(&tree)? } else { Vec::new() };
        write_modules(&modules, &kernel.modules)?;
        fs::remove_dir_all(&tree)?;
        Ok(kernel)
    }
}

/// Modules as `/modules/NAME.ko`, and their order, a name a line, in `/modules/order`.
fn write_modules(modules: &[modules::Module], path: &Path) -> Result<()> {
    write_whole(path, |output| {
        let mut writer = Writer::new(output);
        let mut order = String::new();
        for module in modules {
            writer.file(&format!("/modules/{}.ko", module.name), &module.code)?;
            order.push_str(&module.name);
            order.push('\n');
        }
        writer.file("/modules/order", order.as_bytes())?;
        writer.finish().map(drop)
    })
}

/// The project's programs that go into the guest.
#[derive(Debug)]
pub(super) struct Programs {
    /// Started by the kernel: runs the cases.
    pub(super) init: PathBuf,
    pub(super) others: Vec<(&'static str, PathBuf)>,
}

impl Programs {
    /// An archive of them, of [`TOOLS`], and of the libraries that these load; named by what it holds.
    ///
    /// # Errors
    ///
    /// A program is missing or cannot be read.
    pub(super) fn pack(&self, directory: &Path) -> Result<PathBuf> {
        let mut files = vec![(INIT.to_owned(), self.init.clone())];
        files.extend(self.others.iter().map(|(name, path)| (format!("/usr/bin/{name}"), path.clone())));
        for tool in TOOLS {
            files.push((format!("/usr/bin/{tool}"), find(tool)?));
        }
        // Where scripts name it.
        files.push(("/bin/sh".to_owned(), find("sh")?));
        let libraries = libraries(files.iter().map(|(_, path)| path.as_path()))?;
        files.extend(libraries.into_iter().map(|path| (path.clone(), PathBuf::from(path))));

        let stripped = directory.join("stripped");
        fs::create_dir_all(&stripped)?;
        let mut contents = Vec::new();
        for (name, path) in files {
            contents.push((name, without_debug_information(&path, &stripped)?));
        }
        let archive = directory.join(format!("programs-{:016x}.cpio", digest(&contents)));
        if !archive.exists() {
            remove_older(directory)?;
            write_whole(&archive, |output| {
                let mut writer = Writer::new(output);
                for place in ["proc", "sys", "dev", "tmp", "run"] {
                    writer.directory(place)?;
                }
                for (name, content) in &contents {
                    writer.file(name, content)?;
                }
                writer.finish().map(drop)
            })?;
        }
        Ok(archive)
    }
}

fn find(tool: &str) -> Result<PathBuf> {
    let places = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let found = places.iter().map(|place| Path::new(place).join(tool)).find(|path| path.is_file());
    found.with_context(|| format!("{tool} is not on this machine, but the guests need it"))
}

/// The shared libraries of programs, the loader among them.
fn libraries<'a>(programs: impl Iterator<Item = &'a Path>) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for program in programs {
        let output =
            Command::new("ldd").arg(program).env("LC_ALL", "C").output().context("cannot run ldd")?;
        // It fails for a static program, which needs none.
        found.extend(library_paths(&String::from_utf8_lossy(&output.stdout)));
    }
    Ok(found)
}

/// The paths in what ldd prints: `libm.so.6 => /lib/libm.so.6 (0x7f…)`, or `/lib64/ld-linux.so.2 (0x7f…)`.
fn library_paths(ldd: &str) -> Vec<String> {
    let words = ldd.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    words.map(str::to_owned).collect()
}

/// A program's bytes. Debug information is ten times the rest.
fn without_debug_information(path: &Path, scratch: &Path) -> Result<Vec<u8>> {
    let copy = scratch.join("program");
    fs::copy(path, &copy).with_context(|| format!("reading {}", path.display()))?;
    // Nothing else is lost where there is no `strip`.
    let _ = Command::new("strip").arg("--strip-debug").arg(&copy).output();
    fs::read(&copy).with_context(|| format!("reading {}", copy.display()))
}

fn remove_older(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("programs-")) {
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// One file of the archives one after the other: the kernel unpacks all.
///
/// # Errors
///
/// A file cannot be read or written.
pub(super) fn join(archives: &[&Path], path: &Path) -> Result<()> {
    write_whole(path, |output| {
        archives.iter().try_for_each(|archive| io::copy(&mut File::open(archive)?, output).map(drop))
    })
}

/// Writes a file that appears when it is complete.
fn write_whole(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<()> {
    let part = path.with_extension("part");
    let writing = || -> io::Result<()> {
        let mut output = BufWriter::new(File::create(&part)?);
        write(&mut output)?;
        output.flush()?;
        fs::rename(&part, path)
    };
    writing().with_context(|| format!("writing {}", path.display()))
}

fn digest(content: impl std::hash::Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_in_what_ldd_prints() {
        let printed = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibm.so.6 => /lib/libm.so.6 (0x00007f)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(library_paths(printed), ["/lib/libm.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert_eq!(library_paths("\tstatically linked\n"), [""; 0]);
    }
}
