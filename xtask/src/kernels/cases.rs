//! What is tried in a guest, and how much of it in which kernel. The cases themselves are in
//! `tests/src/bin/sheave-guest`.

/// Every case, in the order in which they run.
pub(super) const ALL: [&str; 30] = [
    "load",
    "smoke",
    "packets",
    "packets-more",
    "virtio-native-one-arm",
    "virtio-native-two-arms",
    "virtio-generic-one-arm",
    "virtio-generic-two-arms",
    "virtio-one-queue",
    "virtio-offloads-off",
    "virtio-fixed-offloads",
    "e1000e",
    "e1000e-own",
    "vlan-native",
    "vlan-generic",
    "qinq-native",
    "qinq-generic",
    "bond-active-backup",
    "bond-balance-rr",
    "bond-802.3ad",
    "bond-generic",
    "bond-members",
    "bond-members-802.3ad",
    "bond-balance-tlb",
    "vlan-on-bond",
    "bridge",
    "vlan-on-bridge",
    "loss",
    "reorder",
    "duplicates",
];

/// Tried in every kernel: does the program load, does it decide as it should, does it serve.
pub(super) const BASIC: [&str; 3] = ["load", "smoke", "packets"];

/// Tried by every `cargo xtask test`.
pub(super) const SMOKE: [&str; 2] = ["load", "smoke"];

/// Those that need no network card, and so no module.
pub(super) const WITHOUT_CARDS: [&str; 3] = ["load", "packets", "packets-more"];

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::process;

    /// The guest would say "skipped" of a case that it does not know, and nobody would miss it.
    #[test]
    fn the_guest_knows_every_case() {
        let directory = process::workspace().join("tests/src/bin/sheave-guest");
        let texts: String = fs::read_dir(directory)
            .expect("the guest's sources")
            .map(|entry| fs::read_to_string(entry.expect("an entry").path()).expect("a file"))
            .collect();
        for case in ALL {
            assert!(texts.contains(&format!("\"{case}\"")), "{case}");
        }
        assert!(BASIC.iter().chain(&SMOKE).chain(&WITHOUT_CARDS).all(|case| ALL.contains(case)));
    }
}
