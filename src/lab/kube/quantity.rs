//! Resource quantities (`500m`, `2`, `64Mi`, `1e3`) as thousandths. Pure.

/// The quantity in thousandths, rounded up; none when it is not a quantity or
/// too large to count.
pub fn milli(text: &str) -> Option<i128> {
    let text = text.trim();
    if text.is_empty() || text.len() > 64 {
        return None;
    }
    let split = text
        .char_indices()
        .find(|(at, c)| !(c.is_ascii_digit() || *c == '.' || (*at == 0 && matches!(c, '+' | '-'))))
        .map_or(text.len(), |(at, _)| at);
    let (number, suffix) = text.split_at(split);
    let (negative, digits) = match number.as_bytes().first()? {
        b'-' => (true, &number[1..]),
        b'+' => (false, &number[1..]),
        _ => (false, number),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    // value = mantissa * factor / divisor, in thousandths
    let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
    let mut divisor = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let mut factor: i128 = 1000;
    match suffix {
        "" => {}
        "n" => divisor = divisor.checked_mul(1_000_000_000)?,
        "u" => divisor = divisor.checked_mul(1_000_000)?,
        "m" => divisor = divisor.checked_mul(1000)?,
        "k" => factor *= 1000,
        "M" => factor *= 1_000_000,
        "G" => factor *= 1_000_000_000,
        "T" => factor *= 1_000_000_000_000,
        "P" => factor *= 1_000_000_000_000_000,
        "E" => factor *= 1_000_000_000_000_000_000,
        "Ki" => factor <<= 10,
        "Mi" => factor <<= 20,
        "Gi" => factor <<= 30,
        "Ti" => factor <<= 40,
        "Pi" => factor <<= 50,
        "Ei" => factor <<= 60,
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10_i128.checked_pow(exponent.unsigned_abs())?;
            if exponent >= 0 {
                factor = factor.checked_mul(power)?;
            } else {
                divisor = divisor.checked_mul(power)?;
            }
        }
    }
    let scaled = mantissa.checked_mul(factor)?;
    let value = scaled / divisor + i128::from(scaled % divisor != 0);
    Some(if negative { -value } else { value })
}
