//! What the hypervisor has agreed with a virtio network card. Its driver takes no XDP program while the hypervisor may hand
//! over merged segments or unfinished checksums, unless the guest can have that stopped (`virtnet_xdp_set` in the kernel's
//! `drivers/net/virtio_net.c`).

use std::{fs, path::Path};

/// VIRTIO_NET_F_CTRL_GUEST_OFFLOADS (virtio 1.2, 5.1.3): the guest may switch the following.
const CTRL_GUEST_OFFLOADS: usize = 2;
/// What the hypervisor may do to packets on their way to the guest: number of the feature, and its name in QEMU.
const GUEST_OFFLOADS: [(usize, &str); 7] = [
    (1, "guest_csum"),
    (7, "guest_tso4"),
    (8, "guest_tso6"),
    (9, "guest_ecn"),
    (10, "guest_ufo"),
    (54, "guest_uso4"),
    (55, "guest_uso6"),
];

/// The offloads of a virtio card that keep the program from it in native mode. Empty also for any other card.
pub fn obstacles(interface: &str) -> Vec<&'static str> {
    let path = Path::new("/sys/class/net").join(interface).join("device/features");
    fs::read_to_string(path).map_or_else(|_| Vec::new(), |features| obstacles_among(features.trim()))
}

/// The same from the file's content: a 0 or 1 for each feature, the first is feature 0.
fn obstacles_among(features: &str) -> Vec<&'static str> {
    let has = |number: usize| features.as_bytes().get(number) == Some(&b'1');
    if has(CTRL_GUEST_OFFLOADS) {
        return Vec::new();
    }
    GUEST_OFFLOADS.into_iter().filter(|(number, _)| has(*number)).map(|(_, name)| name).collect()
}

/// What is to be set where the virtual machine is defined. None: nothing is in the way.
pub fn hypervisor_fix(interface: &str) -> Option<String> {
    fix_for(&obstacles(interface))
}

/// The same for these obstacles.
pub fn fix_for(obstacles: &[&str]) -> Option<String> {
    if obstacles.is_empty() {
        return None;
    }
    let all: Vec<_> = obstacles.iter().map(|name| format!("{name}=off")).collect();
    let libvirt: Vec<_> = obstacles
        .iter()
        .filter_map(|name| name.strip_prefix("guest_"))
        // libvirt has no word for the newest two.
        .filter(|name| !name.starts_with("uso"))
        .map(|name| format!("{name}='off'"))
        .collect();
    Some(format!(
        "set on the hypervisor, as the guest cannot: ctrl_guest_offloads=on, or {} (QEMU: properties of virtio-net-pci; \
         libvirt: `<driver><guest {}/></driver>` in the interface), and start the virtual machine anew",
        all.join(","),
        libvirt.join(" ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(numbers: &[usize]) -> String {
        (0..64).map(|number| if numbers.contains(&number) { '1' } else { '0' }).collect()
    }

    #[test]
    fn every_guest_offload_is_in_the_way_unless_the_guest_can_switch_it() {
        let all = [1, 7, 8, 9, 10, 54, 55];
        let names = GUEST_OFFLOADS.map(|(_, name)| name);
        assert_eq!(obstacles_among(&features(&all)), names);
        assert_eq!(obstacles_among(&features(&[0, 1, 5])), ["guest_csum"]);
        assert_eq!(obstacles_among(&features(&[1, 2, 7, 8, 9, 10])), [""; 0]);
        assert_eq!(obstacles_among(&features(&[0, 5, 16])), [""; 0]);
        assert_eq!(obstacles_among(""), [""; 0]);
    }

    #[test]
    fn the_fix_names_what_is_on_and_where_it_is_set() {
        assert_eq!(fix_for(&[]), None);
        let fix = fix_for(&obstacles_among(&features(&[1, 7, 8, 9, 10]))).unwrap();
        for part in [
            "on the hypervisor",
            "ctrl_guest_offloads=on",
            "guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off",
            "<guest csum='off' tso4='off' tso6='off' ecn='off' ufo='off'/>",
        ] {
            assert!(fix.contains(part), "{part}: {fix}");
        }
        assert!(!fix.contains("ethtool"), "impossible there: {fix}");
    }
}
