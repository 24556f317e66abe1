/// Returns 1 divided by the number of classes that the prediction names, if the right class is
/// among them; otherwise 0.
///
/// Classes whose name is a part of the right class's name do not count. The original removes them
/// from the list while iterating over it, so the class after a removed one is skipped; this
/// function does the same.
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
