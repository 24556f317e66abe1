/// 1 over the number of classes that the prediction names, if the right one is among them; else 0.
///
/// Classes whose name is part of the right one's don't count as named. The original strikes them off the list that it walks, so
/// that the one after a struck one is not looked at; so does this.
pub fn classification(prediction: &str, answer: &str, classes: &[String]) -> f64 {
    let mut named: Vec<&str> =
        classes.iter().map(String::as_str).filter(|class| prediction.contains(class)).collect();
    let mut i = 0;
    while let Some(&class) = named.get(i) {
        if class != answer && answer.contains(class) {
            let first = named.iter().position(|other| *other == class).unwrap_or(i);
            named.remove(first);
        }
        i += 1;
    }
    if named.contains(&answer) { 1.0 / named.len() as f64 } else { 0.0 }
}
