//! The few things about a network card that only the ethtool ioctl says (`linux/ethtool.h`). Structures are built and
//! read as bytes in native order, so that one ioctl is the only unsafe step.

use std::{collections::BTreeMap, io, net::UdpSocket, os::fd::AsRawFd};

const SIOCETHTOOL: libc::c_ulong = 0x8946; // linux/sockios.h

const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_SFEATURES: u32 = 0x3b;
const ETH_SS_FEATURES: u32 = 4;
const ETH_GSTRING_LEN: usize = 32;

/// The name of the driver.
pub(super) fn driver(interface: &str) -> io::Result<String> {
    let mut buffer = vec![0; 196]; // struct ethtool_drvinfo
    write_u32(&mut buffer, 0, ETHTOOL_GDRVINFO);
    request(interface, &mut buffer)?;
    Ok(string_at(&buffer, 4, 32))
}

/// An offload of a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Feature {
    /// Its place in the kernel's list.
    bit: usize,
    /// It is at work.
    pub(super) active: bool,
    /// It may be switched.
    pub(super) changeable: bool,
}

/// The offloads by the kernel's name (`rx-lro`).
pub(super) fn features(interface: &str) -> io::Result<BTreeMap<String, Feature>> {
    let names = feature_names(interface)?;
    let blocks = names.len().div_ceil(32);
    // struct ethtool_gfeatures, then per 32 features: available, requested, active, never_changed.
    let mut buffer = vec![0; 8 + blocks * 16];
    write_u32(&mut buffer, 0, ETHTOOL_GFEATURES);
    write_u32(&mut buffer, 4, blocks as u32);
    request(interface, &mut buffer)?;
    let is_set =
        |bit: usize, word: usize| read_u32(&buffer, 8 + bit / 32 * 16 + word * 4) & (1 << (bit % 32)) != 0;
    let feature =
        |bit| Feature { bit, active: is_set(bit, 2), changeable: is_set(bit, 0) && !is_set(bit, 3) };
    Ok(names.into_iter().enumerate().map(|(bit, name)| (name, feature(bit))).collect())
}

/// Switches some offloads. The kernel may switch others that depend on them.
pub(super) fn set_features(interface: &str, wanted: &[(Feature, bool)]) -> io::Result<()> {
    let blocks = wanted.iter().map(|(feature, _)| feature.bit / 32 + 1).max().unwrap_or(0);
    let total = feature_names(interface)?.len().div_ceil(32).max(blocks);
    // struct ethtool_sfeatures, then per 32 features: valid, requested.
    let mut buffer = vec![0; 8 + total * 8];
    write_u32(&mut buffer, 0, ETHTOOL_SFEATURES);
    write_u32(&mut buffer, 4, total as u32);
    for (feature, on) in wanted {
        let offset = 8 + feature.bit / 32 * 8;
        let mask = 1 << (feature.bit % 32);
        let valid = read_u32(&buffer, offset) | mask;
        let requested = read_u32(&buffer, offset + 4) | if *on { mask } else { 0 };
        write_u32(&mut buffer, offset, valid);
        write_u32(&mut buffer, offset + 4, requested);
    }
    request(interface, &mut buffer)
}

fn feature_names(interface: &str) -> io::Result<Vec<String>> {
    let mut buffer = vec![0; 20]; // struct ethtool_sset_info with room for one count
    write_u32(&mut buffer, 0, ETHTOOL_GSSET_INFO);
    buffer[8..16].copy_from_slice(&(1_u64 << ETH_SS_FEATURES).to_ne_bytes());
    request(interface, &mut buffer)?;
    let count = read_u32(&buffer, 16) as usize;
    let mut buffer = vec![0; 12 + count * ETH_GSTRING_LEN]; // struct ethtool_gstrings
    write_u32(&mut buffer, 0, ETHTOOL_GSTRINGS);
    write_u32(&mut buffer, 4, ETH_SS_FEATURES);
    write_u32(&mut buffer, 8, count as u32);
    request(interface, &mut buffer)?;
    Ok((0..count).map(|place| string_at(&buffer, 12 + place * ETH_GSTRING_LEN, ETH_GSTRING_LEN)).collect())
}

/// Sends one ethtool command. `buffer` starts with the command and must be as large as that command's structure with
/// the counts it holds.
fn request(interface: &str, buffer: &mut [u8]) -> io::Result<()> {
    let name = interface.as_bytes();
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "interface name too long"));
    }
    // Any socket does; the ioctl looks only at its network namespace.
    let socket = UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("[::]:0"))?;
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    let mut ifreq = libc::ifreq {
        ifr_name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: buffer.as_mut_ptr().cast() },
    };
    // SAFETY: the descriptor is open, `ifreq` is initialised and its data pointer is to `buffer`, which the callers
    // size for the command they put into it, and which nobody else uses during the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut ifreq) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn read_u32(buffer: &[u8], offset: usize) -> u32 {
    buffer.get(offset..offset + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn write_u32(buffer: &mut [u8], offset: usize, value: u32) {
    buffer[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
}

fn string_at(buffer: &[u8], offset: usize, length: usize) -> String {
    let bytes = buffer.get(offset..offset + length).unwrap_or_default();
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(bytes).into_owned()
}
