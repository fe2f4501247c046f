//! The query of `GET /v1/flows`, written and read.

use std::fmt::Write as _;

use super::commands::FlowFilter;

/// The URI that asks for these flows. Names, addresses and numbers need no escapes but for the brackets of IPv6.
pub(super) fn of_flows(filter: &FlowFilter) -> String {
    let mut uri = "/v1/flows?".to_owned();
    let mut add = |key: &str, value: &str| {
        let _ = write!(uri, "{key}=");
        for byte in value.bytes() {
            // Writing to a String cannot fail.
            let _ = match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b':' => {
                    uri.push(byte.into());
                    Ok(())
                }
                _ => write!(uri, "%{byte:02X}"),
            };
        }
        uri.push('&');
    };
    if let Some(client) = filter.client {
        add("client", &client.to_string());
    }
    if let Some(backend) = &filter.backend {
        add("backend", backend);
    }
    if let Some(service) = &filter.service {
        add("service", service);
    }
    if filter.min_age > 0 {
        add("min_age", &filter.min_age.to_string());
    }
    uri.pop();
    uri
}

/// What a query asks for, or what is wrong with it.
pub(super) fn flows(query: &str) -> Result<FlowFilter, String> {
    let mut filter = FlowFilter::default();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = unescape(value).ok_or_else(|| format!("{pair:?} is not a query"))?;
        match key {
            "client" => {
                let address = value.parse().map_err(|_| format!("client: {value:?} is not an address"))?;
                filter.client = Some(address);
            }
            "backend" => filter.backend = Some(value),
            "service" => filter.service = Some(value),
            "min_age" => {
                filter.min_age =
                    value.parse().map_err(|_| format!("min_age: {value:?} is not a number of seconds"))?;
            }
            _ => return Err(format!("{key:?} is not known: there are client, backend, service and min_age")),
        }
    }
    Ok(filter)
}

fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
        // Which takes a sign as well.
        if digits.starts_with('+') {
            return None;
        }
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(uri: &str) -> Result<FlowFilter, String> {
        flows(uri.strip_prefix("/v1/flows").unwrap().trim_start_matches('?'))
    }

    #[test]
    fn what_is_written_is_read() {
        let some = FlowFilter {
            client: Some("fd00::5".parse().unwrap()),
            backend: Some("[fd00::1]:6443".to_owned()),
            service: Some("api&x=%".to_owned()),
            min_age: 60,
        };
        assert_eq!(read(&of_flows(&some)).unwrap(), some);
        assert_eq!(read(&of_flows(&FlowFilter::default())).unwrap(), FlowFilter::default());
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (query, what) in [
            ("client=nobody", "not an address"),
            ("min_age=soon", "not a number"),
            ("colour=red", "there are client"),
            ("backend=%f", "not a query"),
            ("backend=%ff", "not a query"),
            ("backend=%+1", "not a query"),
        ] {
            let error = flows(query);
            assert!(error.as_ref().is_err_and(|error| error.contains(what)), "{query}: {error:?}");
        }
    }
}
