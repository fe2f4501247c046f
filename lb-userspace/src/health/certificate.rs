//! What status and doctor say about a certificate.

use std::{net::IpAddr, time::SystemTime};

use x509_parser::{extensions::GeneralName, prelude::FromDer as _};

/// Whom a certificate is for, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFacts {
    /// The subject, as text: `CN=kube-apiserver`.
    pub subject: String,
    /// DNS names it is valid for.
    pub names: Vec<String>,
    /// Addresses it is valid for.
    pub addresses: Vec<IpAddr>,
    /// Seconds since 1970 at which its validity ends.
    pub not_after: i64,
}

impl CertificateFacts {
    /// Reads a DER certificate. `None` when it is not one.
    #[must_use]
    pub fn from_der(der: &[u8]) -> Option<Self> {
        let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(der).ok()?;
        let mut facts = Self {
            subject: certificate.subject().to_string(),
            names: Vec::new(),
            addresses: Vec::new(),
            not_after: certificate.validity().not_after.timestamp(),
        };
        let alternatives = certificate.subject_alternative_name().ok().flatten();
        for name in alternatives.iter().flat_map(|extension| &extension.value.general_names) {
            match name {
                GeneralName::DNSName(name) => facts.names.push((*name).to_owned()),
                GeneralName::IPAddress(octets) => facts.addresses.extend(address(octets)),
                _ => {}
            }
        }
        Some(facts)
    }

    /// Whole days until it expires, rounded down; negative when it has.
    #[must_use]
    pub fn days_to_expiry(&self, now: SystemTime) -> i64 {
        let now = match now.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            Err(_) => 0,
        };
        self.not_after.saturating_sub(now).div_euclid(86_400)
    }
}

fn address(octets: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(octets) {
        return Some(IpAddr::from(octets));
    }
    <[u8; 16]>::try_from(octets).ok().map(IpAddr::from)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn names_addresses_and_expiry_are_read() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec![
            "kubernetes.default.svc".to_owned(),
            "10.96.0.1".to_owned(),
            "fd00::1".to_owned(),
        ])
        .unwrap();
        params.not_after = rcgen::date_time_ymd(2040, 1, 2);
        let facts = CertificateFacts::from_der(params.self_signed(&key).unwrap().der()).unwrap();

        assert_eq!(facts.names, ["kubernetes.default.svc"]);
        assert_eq!(facts.addresses, ["10.96.0.1", "fd00::1"].map(|text| text.parse::<IpAddr>().unwrap()));
        // 2040-01-01T00:00:00Z
        let day_before = SystemTime::UNIX_EPOCH + Duration::from_secs(2_208_988_800);
        assert_eq!(facts.days_to_expiry(day_before), 1);
        assert_eq!(facts.days_to_expiry(day_before + Duration::from_secs(86_401)), -1);
        assert_eq!(CertificateFacts::from_der(b"garbage"), None);
    }
}
