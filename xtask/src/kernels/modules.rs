//! A kernel's modules: those that the guest needs, in an order in which each finds what it depends on.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

/// What the cases need beyond what is built in. A kernel that lacks one has it built in, or under no such name.
pub(super) const WANTED: [&str; 17] = [
    "crc32c_generic",
    "virtio_pci",
    "virtio_net",
    "e1000e",
    "veth",
    "bridge",
    "bonding",
    "8021q",
    "sch_netem",
    "sch_ingress",
    "nf_tables",
    "nft_counter",
    "nft_objref",
    "nft_limit",
    "inet_diag",
    "tcp_diag",
    "af_packet",
];

/// A module, ready to be inserted.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) code: Vec<u8>,
}

/// The modules below `tree` that [`WANTED`] need, each after those that it depends on.
///
/// # Errors
///
/// A module cannot be read or unpacked.
pub(super) fn collect(tree: &Path) -> Result<Vec<Module>> {
    let files = find(tree)?;
    let mut modules = Vec::new();
    let mut seen = BTreeSet::new();
    for wanted in WANTED {
        add(wanted, &files, &mut seen, &mut modules)?;
    }
    ensure!(!modules.is_empty(), "{} holds no module that is wanted", tree.display());
    Ok(modules)
}

fn add(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    seen: &mut BTreeSet<String>,
    modules: &mut Vec<Module>,
) -> Result<()> {
    let name = name.replace('-', "_");
    let Some(path) = files.get(&name) else { return Ok(()) };
    if !seen.insert(name.clone()) {
        return Ok(());
    }
    let code = unpack(path)?;
    for needed in depends(&code) {
        add(&needed, files, seen, modules)?;
    }
    modules.push(Module { name, code });
    Ok(())
}

/// All modules by their names.
fn find(tree: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut left = vec![tree.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))? {
            let path = entry?.path();
            if path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                left.push(path);
            } else if let Some((name, "ko" | "ko.xz" | "ko.zst")) =
                path.file_name().and_then(|name| name.to_str()).and_then(|name| name.split_once('.'))
            {
                found.insert(name.replace('-', "_"), path);
            }
        }
    }
    Ok(found)
}

fn unpack(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(path).with_context(|| format!("reading {}", path.display())),
    };
    let output = Command::new(program).arg("-dc").arg(path).output();
    let output = output.with_context(|| format!("cannot run {program}: install it"))?;
    ensure!(output.status.success(), "{program} cannot unpack {}", path.display());
    Ok(output.stdout)
}

/// What a module says it depends on, in its section `.modinfo`: `depends=` and names, and a zero.
fn depends(code: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = code.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = code[start + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_depends_on() {
        assert_eq!(
            depends(b"\0license=GPL\0depends=net_failover,virtio\0name=virtio_net\0"),
            ["net_failover", "virtio"]
        );
        assert_eq!(depends(b"\0depends=\0name=virtio\0"), [""; 0]);
        assert_eq!(depends(b"no module"), [""; 0]);
    }
}
